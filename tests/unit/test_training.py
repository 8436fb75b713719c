"""Training on recordings made here: pages that a query names must be found, others not; and what is refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")

from rich.console import Console

from sglang_lsa.indexer.model import MemoryIndexer, page_runs
from sglang_lsa.indexer.record import Entry, Manifest
from sglang_lsa.indexer.recording import BLOCK, RUNS, BadRecording, write_recording
from sglang_lsa.training.data import Batches, load_recordings, retrieval_heads
from sglang_lsa.training.losses import LOSSES
from sglang_lsa.training.recall import Rules, measure, summarise
from sglang_lsa.training.settings import TrainSettings
from sglang_lsa.training.towers import as_sentence_transformer, logits
from sglang_lsa.training.train import train

WIDTH, LAYERS, HEADS, PAGES, BLOCKS = 32, (1, 3), 6, 80, 8
SEEKER = 4
"""The head that attends to what its query names; all others attend to a page that never matters."""
QUICK = TrainSettings(
    steps=400, learning_rate=5e-3, batch=8, pages=24, rank=32, heads=2, head_dim=32, sub_keys=2, positions=4
)


def write(folder: pathlib.Path, name: str, split: str, seed: int, width: int = WIDTH, **changed: Any) -> None:
    """A document whose pages each have a mark. What comes next needs the pages whose marks the query's states hold."""
    rng = torch.Generator().manual_seed(seed)
    marks = torch.randn((PAGES, width), generator=torch.Generator().manual_seed(0))
    marks = torch.nn.functional.normalize(marks, dim=1)[torch.randperm(PAGES, generator=rng)]
    start = PAGES * 64
    hidden = torch.randn((32 + BLOCKS * BLOCK, len(LAYERS), width), generator=rng) * 0.1
    runs = torch.randn((PAGES + 2, len(LAYERS), RUNS, width), generator=rng) * 0.3
    runs[torch.arange(PAGES), :, 3] += marks[:, None] * 6
    mass = torch.rand((BLOCKS, HEADS, PAGES + 2), generator=rng) * 0.02
    mass[:, :SEEKER, 7] = 0.9
    needed = torch.stack([torch.randperm(PAGES - 10, generator=rng)[:1] + 2 for _ in range(BLOCKS)])
    for block in range(BLOCKS):
        mass[block, SEEKER, needed[block]] = 0.6
        later = needed[block : block + 4].flatten()
        at = 32 + block * BLOCK
        for ago, page in enumerate(later.tolist(), 1):
            hidden[at - ago] += marks[page] * 3
    facts = {
        "prompt_tokens": start + BLOCKS * BLOCK,
        "tokens": start + BLOCKS * BLOCK,
        "start": start,
        "first": start - 32,
        "layers": list(LAYERS),
        "model_layers": 4,
        "q_heads": HEADS,
    }
    tensors = {
        "input_ids": torch.zeros(start + BLOCKS * BLOCK, dtype=torch.int32),
        "hidden": hidden.bfloat16(),
        "runs": runs.bfloat16(),
        "mass": mass.half(),
        "quest": torch.rand((BLOCKS, PAGES + 2), generator=rng).half(),
        "mean_key": torch.rand((BLOCKS, PAGES + 2), generator=rng).half(),
    }
    path = folder / f"{name}.safetensors"
    write_recording(path, tensors | changed, facts)
    evidence = tuple(sorted(set(needed.flatten().tolist())))
    entry = Entry(name, "marks", split, name, facts["tokens"], BLOCKS * BLOCK, evidence, path.stat().st_size)
    manifest = Manifest.open(folder, "a/model/that/is/not/here")
    manifest.add(entry)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(40):
        write(folder, f"train-{number}", "train", number)
    for number in range(4):
        write(folder, f"held-out-{number}", "held-out", 1000 + number)
    return folder


@pytest.fixture(scope="module")
def trained(data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("indexer")
    settings = TrainSettings(**{**QUICK.__dict__, "retrieval_heads": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", forbidden)
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", forbidden)
        rows = train(data, output, settings, "cpu", Console(quiet=True))
    return output, rows


def forbidden(*arguments: Any, **options: Any) -> None:
    raise AssertionError("the backbone was loaded")


def test_it_learns_what_the_training_free_policies_cannot_see(
    trained: tuple[pathlib.Path, list[dict[str, Any]]],
) -> None:
    recall = {row["selector"]: row["recall"] for row in summarise(trained[1]) if row["budget"] == 0.135}
    assert recall["oracle"] > 0.95
    assert recall["indexer"] > 0.6
    assert max(recall["random"], recall["recency"], recall["quest"], recall["mean_key"]) < 0.4


def test_the_checkpoint_serves(trained: tuple[pathlib.Path, list[dict[str, Any]]], data: pathlib.Path) -> None:
    """What was written scores like what was trained, and says what it is."""
    output, rows = trained
    indexer = MemoryIndexer.load(output)
    held_out = load_recordings(data, "held-out", retrieval_heads(data, 1))
    again = measure(held_out, indexer, Rules(QUICK.golden, QUICK.positions), progress=False)
    assert again == rows
    card = (output / "README.md").read_text()
    assert "## Held-out recall" in card and "| all | 13.5% | indexer |" in card
    written = json.loads((output / "recall.json").read_text())
    assert written["settings"]["retrieval_heads"] == 1 and written["history"]


def test_the_same_seed_gives_the_same_indexer(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quick = TrainSettings(**{**QUICK.__dict__, "steps": 12})
    rows = [train(data, tmp_path / str(run), quick, "cpu", Console(quiet=True)) for run in range(2)]
    assert rows[0] == rows[1]


def test_retrieval_heads_are_those_that_read_the_evidence(data: pathlib.Path) -> None:
    assert retrieval_heads(data, 1) == [SEEKER]


def test_towers_in_training_score_like_the_served_ones(data: pathlib.Path) -> None:
    from sglang_lsa.training.train import config_for

    (recording, *_) = load_recordings(data, "held-out")
    torch.manual_seed(0)
    indexer = MemoryIndexer(config_for(recording, QUICK))
    torch.nn.init.normal_(indexer.bias)
    model = as_sentence_transformer(indexer, "cpu")
    batch = Batches([recording], 4, 200, 0.2)([{"query": 0, "document": 2}])
    parts = [{"input_features": batch[f"{name}_input_features"], "task": name} for name in ("query", "document")]
    with torch.no_grad():
        trained = logits(*(model(part) for part in parts))[0]
        keys = indexer.keys_of_runs(recording.runs[:PAGES])
        served = indexer.score(recording.queries(2, 4), keys)
    torch.testing.assert_close(trained[:PAGES].sigmoid(), served)


def test_keys_of_a_page_are_those_of_its_runs() -> None:
    from sglang_lsa.indexer.checkpoint import IndexerConfig

    indexer = MemoryIndexer(IndexerConfig(WIDTH, 4, LAYERS, rank=8, heads=2, head_dim=8, sub_keys=4))
    hidden = torch.randn((3, 64, len(LAYERS), WIDTH))
    torch.testing.assert_close(
        indexer.page_keys(hidden), indexer.keys_of_runs(page_runs(hidden).transpose(1, 2)), rtol=0, atol=0
    )


def test_batches_hold_positives_and_hard_negatives(data: pathlib.Path) -> None:
    recordings = load_recordings(data, "train", [SEEKER])
    batches = Batches(recordings, 4, 24, 0.2)
    for row in batches.rows()[:20]:
        label = recordings[row["query"]].label(row["document"]).numpy()
        drawn = batches._draw(recordings[row["query"]], row["document"], label)
        assert len(set(drawn.tolist())) == 24
        golden = set(np.flatnonzero(label >= 0.2).tolist())
        assert len(golden & set(drawn.tolist())) == min(12, len(golden))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_prefer_the_truth(name: str) -> None:
    mass = torch.tensor([[0.8, 0.0, 0.05, -1.0], [0.0, 0.5, 0.4, 0.0]])
    right = torch.where(mass >= 0.2, 3.0, -6.0)
    loss = LOSSES[name]
    assert loss(right, mass, 0.2) < loss(torch.zeros_like(right), mass, 0.2) < loss(-right, mass, 0.2)
    changed = right.clone()
    changed[0, 3] = 50.0  # no page there
    assert loss(changed, mass, 0.2) == loss(right, mass, 0.2)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_a_needed_page_are_finite(name: str) -> None:
    mass = torch.tensor([[0.0, 0.01, -1.0]])
    scores = torch.zeros((1, 3), requires_grad=True)
    loss = LOSSES[name](scores, mass, 0.2)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(scores.grad).all()  # type: ignore[arg-type]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("none", "run sglang-lsa record first"),
        ("manifest", "is damaged"),
        ("old", "record again with this version"),
        ("split", "has no recordings of the split held-out"),
        ("missing", "cannot be read"),
        ("cut", "is damaged"),
        ("nan", "are no numbers"),
        ("width", "record into separate folders"),
    ],
)
def test_bad_data_is_refused(damage: str, words: str, tmp_path: pathlib.Path) -> None:
    if damage != "none":
        write(tmp_path, "a", "train", 1)
    if damage not in ("none", "split"):
        write(tmp_path, "b", "held-out", 2)
        write(tmp_path, "c", "train", 3, width=16 if damage == "width" else WIDTH)
    manifest = tmp_path / "manifest.json"
    if damage == "manifest":
        manifest.write_text(manifest.read_text()[:-30])
    elif damage == "old":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    elif damage == "missing":
        (tmp_path / "c.safetensors").unlink()
    elif damage == "cut":
        content = (tmp_path / "c.safetensors").read_bytes()
        (tmp_path / "c.safetensors").write_bytes(content[:-100])
    elif damage == "nan":
        write(tmp_path, "c", "train", 3, hidden=torch.full((32 + BLOCKS * BLOCK, 2, WIDTH), float("nan")))
    with pytest.raises(BadRecording, match=words):
        train(tmp_path, tmp_path / "out", QUICK, "cpu", Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loss": "mse"}, "--loss is 'mse'"),
        ({"sub_keys": 3}, "--sub-keys 3"),
        ({"golden": 0.0}, "--golden 0.0"),
        ({"steps": 0}, "--steps 0"),
        ({"learning_rate": -1.0}, "--learning-rate -1.0"),
        ({"retrieval_heads": -1}, "--retrieval-heads -1"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainSettings(**changed)


def test_another_model_is_refused(data: pathlib.Path) -> None:
    with pytest.raises(BadRecording, match="use another --output"):
        Manifest.open(data, "some/other-model")
