"""Training on recordings made here: pages that a query names must be found, others not; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers")

from rich.console import Console

from sglang_lsa.config import RUNS, LSAConfig
from sglang_lsa.indexer.checkpoint import IndexerConfig, ModelShape, shipped_indexers
from sglang_lsa.indexer.heads import retrieval_heads
from sglang_lsa.indexer.manifest import Entry, Manifest
from sglang_lsa.indexer.model import MemoryIndexer, slow_dimensions
from sglang_lsa.indexer.recording import BLOCK, BadRecording, write_recording
from sglang_lsa.kernels.page_score import from_8_bits, to_8_bits
from sglang_lsa.training.calibrate import calibrate, with_threshold
from sglang_lsa.training.data import Batches, load_recordings
from sglang_lsa.training.losses import LOSSES, PageLoss
from sglang_lsa.training.recall import Rules, measure, predict, summarise
from sglang_lsa.training.results import calibrate_indexer, measure_indexer, measure_set_sizes
from sglang_lsa.training.settings import TrainSettings
from sglang_lsa.training.towers import as_sentence_transformer, scores
from sglang_lsa.training.train import config_for, split_off, train

SHAPE = ModelShape(hidden_size=99, num_hidden_layers=4, q_heads=6, kv_heads=2, head_dim=16)
LAYERS, PAGES, BLOCKS, BEFORE = (1, 3), 80, 8, 32
SEEKER = (3, 4)
"""The head that attends to what its query names; all others attend to a page that never matters."""
QUICK = TrainSettings(heads=1, key_dim=16, positions=16, steps=90, learning_rate=2e-2, batch=8, patience=20)


def write(
    folder: pathlib.Path,
    name: str,
    split: str,
    seed: int,
    head_dim: int = 16,
    q_heads: int = SHAPE.q_heads,
    **changed: Any,
) -> None:
    """A document whose pages each have a mark, which one of its keys carries. What comes next needs the pages whose
    marks the seeker's recent queries name. Marks are in one half of the dimensions; the other half is loud noise, which
    hides them until it is learned which is which."""
    rng = torch.Generator().manual_seed(seed)
    same = torch.Generator().manual_seed(0)
    marks = torch.nn.functional.normalize(torch.randn((PAGES, head_dim // 2), generator=same), dim=1)
    marks = marks[torch.randperm(PAGES, generator=rng)]
    start, tokens = PAGES * 64, PAGES * 64 + BLOCKS * BLOCK
    queries = torch.randn((BEFORE + BLOCKS * BLOCK, 2, q_heads, head_dim), generator=rng)
    runs = torch.randn((PAGES + 2, RUNS, 2, SHAPE.kv_heads, head_dim), generator=rng)
    for drawn in (queries, runs):
        drawn[..., : head_dim // 2] *= 3
    runs[torch.arange(PAGES), 3, 1, 1, head_dim // 2 :] = 6 * marks
    mass = torch.rand((BLOCKS, SHAPE.num_hidden_layers * q_heads, PAGES + 2), generator=rng) * 0.02
    mass[:, :, 7] = 0.9
    seeker = SEEKER[0] * q_heads + SEEKER[1]
    mass[:, seeker] = torch.rand((BLOCKS, PAGES + 2), generator=rng) * 0.02
    needed = (torch.randperm(PAGES - 10, generator=rng)[:BLOCKS] + 2).tolist()
    for block, page in enumerate(needed):
        mass[block, seeker, page] = 0.6
        for ahead in range(4):  # as soon as it is in the next window
            at = max(0, BEFORE + (block - ahead) * BLOCK - 1 - ahead)
            queries[at, 1, SEEKER[1], head_dim // 2 :] = 6 * marks[page]
    facts = {
        "prompt_tokens": tokens,
        "tokens": tokens,
        "start": start,
        "first": start - BEFORE,
        "layers": list(LAYERS),
        "model_layers": SHAPE.num_hidden_layers,
        "hidden_size": SHAPE.hidden_size,
        "q_heads": q_heads,
    }
    tensors = {
        "input_ids": torch.zeros(tokens, dtype=torch.int32),
        "queries": queries.bfloat16(),
        "runs": runs.bfloat16(),
        "mass": mass.half(),
        "quest": torch.rand((BLOCKS, PAGES + 2), generator=rng).half(),
        "mean_key": torch.rand((BLOCKS, PAGES + 2), generator=rng).half(),
    }
    path = folder / f"{name}.safetensors"
    write_recording(path, tensors | changed, facts)
    entry = Entry(name, "marks", split, name, tokens, BLOCKS * BLOCK, tuple(sorted(needed)), path.stat().st_size)
    manifest = Manifest.open(folder, "a/model/that/is/not/here")
    manifest.add(entry)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are so small that threads only wait for each other: minutes where another process needs a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(40):
        write(folder, f"train-{number}", "train", number)
    for number in range(6):
        write(folder, f"held-out-{number}", "held-out", 1000 + number)
    return folder


Trained = tuple[pathlib.Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    output = tmp_path_factory.mktemp("indexer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", forbidden)
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", forbidden)
        rows = train(data, output, QUICK, "cpu", Console(quiet=True))
    return output, rows


def forbidden(*arguments: Any, **options: Any) -> None:
    raise AssertionError("the backbone was loaded")


def test_it_learns_what_it_could_not_see(trained: Trained, data: pathlib.Path) -> None:
    recall = {row["selector"]: row["recall"] for row in summarise(trained[1]) if row["budget"] == 0.135}
    held_out = load_recordings(data, "held-out", [SEEKER])
    fresh = MemoryIndexer(config_for(held_out[0], [SEEKER], QUICK))
    (before,) = summarise(measure(held_out, fresh, Rules(0.3), budgets=(0.135,), selectors=("indexer",)))
    assert recall["oracle"] > 0.95
    assert recall["indexer"] > 0.8
    assert max(before["recall"], recall["random"], recall["recency"], recall["quest"], recall["mean_key"]) < 0.4


def test_the_checkpoint_serves(trained: Trained, data: pathlib.Path) -> None:
    """What was written scores like what was trained, and says what it is."""
    output, rows = trained
    indexer = MemoryIndexer.load(output)
    held_out = load_recordings(data, "held-out", indexer.config.heads)
    assert measure(held_out, indexer, Rules(QUICK.golden), progress=False) == rows
    card = (output / "README.md").read_text()
    assert "# Memory indexer for a/model/that/is/not/here" in card
    assert "## Held-out recall" in card and "| all | 13.5% | indexer |" in card and "3.4" in card
    written = json.loads((output / "recall.json").read_text())
    assert written["settings"]["heads"] == 1 and written["page_bytes"] == 32 * 16
    assert written["history"][0]["step"] == 0


def test_the_threshold_covers_what_it_says(trained: Trained, data: pathlib.Path) -> None:
    indexer = MemoryIndexer.load(trained[0])
    assert indexer.config.threshold > 0
    assert indexer.config.coverage >= QUICK.coverage
    held_out = load_recordings(data, "held-out", [SEEKER])
    found = {target: calibrate(held_out, indexer, Rules(0.3), target) for target in (0.3, 0.5, 0.7)}
    thresholds = [threshold for threshold, _ in found.values()]
    assert thresholds == sorted(thresholds, reverse=True)
    for target, (threshold, coverage) in found.items():
        kept = []
        for recording in held_out:
            keys = indexer.keys_of_runs(recording.runs)
            shares = []
            for anchor in recording.anchors:
                free = torch.from_numpy(recording.free_pages(anchor, 1e-9, 8, 1, 4))
                score, mass = predict(indexer, recording, anchor, keys)[free], recording.label(anchor)[free]
                shares.append(float(mass[score > threshold].sum() / mass.sum()))
            kept.append(sum(shares) / len(shares))
        assert sum(kept) / len(kept) == pytest.approx(coverage, abs=1e-5)
        assert coverage >= target


def test_what_sets_cover_is_measured_when_training_ends_and_again_when_asked_for(
    trained: Trained, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    known = MemoryIndexer.load(trained[0]).config.expectation
    assert known is not None and known.source.startswith("8 recordings of ") and "not trained on" in known.source
    shutil.copytree(trained[0], tmp_path / "indexer")
    quiet = Console(quiet=True)
    found = calibrate_indexer(data, tmp_path / "indexer", "held-out", 0.3, "cpu", quiet)
    again = MemoryIndexer.load(tmp_path / "indexer")
    assert again.config == dataclasses.replace(MemoryIndexer.load(trained[0]).config, expectation=found)
    assert found.source.endswith("split held-out") and found.covered(0.2) <= found.covered(0.8)
    sizes = ([0.1, 0.3], [0.3, 0.6], 0.3, "cpu", quiet, tmp_path / "sizes.json")
    rows = {row["sets"]: row for row in measure_set_sizes(data, tmp_path / "indexer", *sizes)[:4]}
    assert list(rows) == ["10.0%", "30.0%", "auto 0.3", "auto 0.6"]
    assert rows["10.0%"]["pages"] < rows["30.0%"]["pages"] and rows["10.0%"]["mass"] <= rows["30.0%"]["mass"]
    assert rows["auto 0.3"]["pages"] <= rows["auto 0.6"]["pages"] <= LSAConfig.max_budget + 0.01
    assert json.loads((tmp_path / "sizes.json").read_text())["rows"][:4] == list(rows.values())
    with_threshold(again, 0.1, 0.9)
    again.config = dataclasses.replace(again.config, expectation=None)
    again.save(tmp_path / "indexer")
    with pytest.raises(ValueError, match=r"--targets: the indexer does not know .*: run sglang-lsa calibrate first"):
        measure_set_sizes(data, tmp_path / "indexer", *sizes)


def test_the_same_seed_gives_the_same_indexer(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quick = TrainSettings(**{**QUICK.__dict__, "steps": 8})
    rows = [train(data, tmp_path / str(run), quick, "cpu", Console(quiet=True)) for run in range(2)]
    assert rows[0] == rows[1]


def test_retrieval_heads_are_those_that_read_the_evidence(data: pathlib.Path) -> None:
    assert retrieval_heads(data, 1) == [SEEKER]
    assert retrieval_heads(data, 1, observed_only=False) == [SEEKER]
    assert {layer for layer, _ in retrieval_heads(data, 99)} == set(LAYERS)


def test_one_in_five_is_watched_and_not_trained_on(data: pathlib.Path) -> None:
    training, watched = split_off(load_recordings(data, "train", [SEEKER]))
    assert (len(training), len(watched)) == (32, 8)
    assert not {r.entry.name for r in training} & {r.entry.name for r in watched}


def test_labels_are_means_over_heads_of_the_largest_mass(data: pathlib.Path) -> None:
    heads = [(1, 0), SEEKER, (3, 5)]
    (recording, *_) = load_recordings(data, "held-out", heads)
    assert list(recording.anchors) == list(range(BLOCKS))
    for anchor, blocks in ((2, slice(2, 6)), (6, slice(6, 8))):
        pages = PAGES + (anchor * BLOCK) // 64
        expected = recording.mass[blocks, :, :pages].float().amax(0).mean(0)
        torch.testing.assert_close(recording.label(anchor), expected)
    torch.testing.assert_close(recording.past(2), recording.mass[:2, :, :PAGES].float().amax(0).mean(0))
    assert recording.past(0).tolist() == [0.0] * PAGES


def test_towers_in_training_score_like_the_served_ones(data: pathlib.Path) -> None:
    """Padding beside a longer document does not matter, and pages may lie anywhere in the table."""
    recordings = load_recordings(data, "held-out", [(1, 1), (1, 5), SEEKER])
    torch.manual_seed(0)
    indexer = MemoryIndexer(config_for(recordings[0], [(1, 1), (1, 5), SEEKER], QUICK))
    for value in indexer.parameters():
        torch.nn.init.normal_(value, std=0.5)
    model = as_sentence_transformer(indexer, "cpu")
    batch = Batches(recordings, 16, 3, seed=1)([{"query": 0, "document": 0}, {"query": 1, "document": 1}])
    assert batch["label"].shape == (2, 3, PAGES + 2)
    parts = [{"input_features": batch[f"{name}_input_features"], "task": name} for name in ("query", "document")]
    with torch.no_grad():
        queries, pages = (model(part) for part in parts)
        learned = scores(indexer, queries, pages, batch["label"])
        for document in range(2):
            keys = indexer.keys_of_runs(recordings[document].runs)
            places = torch.randperm(99)[: len(keys)] + 1
            table = torch.full((100, *keys.shape[1:]), 127, dtype=torch.uint8)  # NaN
            table[places] = to_8_bits(keys)
            for anchor in range(3):
                known = int((batch["label"][document, anchor] >= 0).sum())
                served = indexer.score(batch["query_input_features"][document][anchor], table, places[:known])
                torch.testing.assert_close(learned[document, anchor, :known], served)
                assert (learned[document, anchor, known:] == 0).all()


def test_keys_of_a_page_are_means_of_its_tokens() -> None:
    config = IndexerConfig(SHAPE, ((1, 0), (1, 5), (3, 4)), sub_keys=4, key_dim=8)
    assert config.layers == (1, 3)
    assert config.key_heads == ((1, 0), (1, 1), (3, 1))
    indexer = MemoryIndexer(config)
    keys = torch.randn((3, 64, 2, SHAPE.kv_heads, 16))
    made = indexer.page_keys(keys)
    assert made.shape == (3, 3, 4, 8)
    for slot, (layer, head) in enumerate(((0, 0), (0, 1), (1, 1))):
        means = keys[:, :, layer, head].view(3, 4, 16, 16).mean(2)[..., [4, 5, 6, 7, 12, 13, 14, 15]]
        torch.testing.assert_close(made[:, slot], from_8_bits(to_8_bits(means)))


def test_slow_dimensions() -> None:
    assert slow_dimensions(8, 4) == [2, 3, 6, 7]
    assert slow_dimensions(8, 8) == list(range(8))


def test_age_and_neighbours_add_to_a_score() -> None:
    indexer = MemoryIndexer(IndexerConfig(SHAPE, (SEEKER,), key_dim=8))
    with torch.no_grad():
        indexer.neighbour.copy_(torch.tensor([0.5, 0.25]).exp().sub(1).log())
        indexer.age.fill_(-100.0)
        indexer.age[1] = torch.tensor(2.0).exp().sub(1).log()
        worth = indexer.combine(torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(worth, torch.tensor([0.0, 0.25, 1.0, 2.5, 2.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_prefer_the_truth(name: str) -> None:
    mass = torch.tensor([[0.8, 0.0, 0.05, -1.0], [0.0, 0.5, 0.4, 0.0]])
    right = mass.clamp(min=0.001)
    loss = LOSSES[name]
    assert loss(right, mass, 0.2) < loss(torch.full_like(right, 0.2), mass, 0.2) < loss(0.8 - right, mass, 0.2)
    changed = right.clone()
    changed[0, 3] = 0.9  # no page there
    assert loss(changed, mass, 0.2) == loss(right, mass, 0.2)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_a_needed_page_are_finite(name: str) -> None:
    mass = torch.tensor([[0.0, 0.01, -1.0]])
    score = torch.zeros((1, 3), requires_grad=True)
    loss = LOSSES[name](score, mass, 0.2)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(score.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_reach_every_parameter(name: str, data: pathlib.Path) -> None:
    """Through both towers, from an indexer as it is before training."""
    recordings = load_recordings(data, "held-out", [SEEKER])
    indexer = MemoryIndexer(config_for(recordings[0], [SEEKER], QUICK))
    batches = Batches(recordings, QUICK.positions, 3)
    batch = batches(batches.rows()[:3])
    parts = [{"input_features": batch[f"{side}_input_features"], "task": side} for side in ("query", "document")]
    PageLoss(as_sentence_transformer(indexer, "cpu"), indexer, name, 0.3)(parts, batch["label"]).backward()
    for parameter, value in indexer.named_parameters():
        assert value.grad is not None and torch.isfinite(value.grad).all(), parameter
        assert value.grad.abs().sum() > 0, parameter


# --- results and shipped indexers ------------------------------------------------------------------------------------


def test_results_replace_those_of_the_same_model(trained: Trained, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "indexer.json"
    output.write_text(json.dumps([{"model": "other", "n": 1}, {"model": "toy", "n": 2}]))
    rows = measure_indexer(data, trained[0], 0.3, "cpu", Console(quiet=True), name="toy", output=output)
    written = json.loads(output.read_text())
    assert written == [{"model": "other", "n": 1}, *rows]
    assert {(row["family"], row["length"], row["n"]) for row in rows} == {("marks", 8192, 6)}
    assert {row["selector"] for row in rows} >= {"indexer", "quest", "oracle", "last_window"}


def test_an_indexer_of_another_model_is_not_measured(data: pathlib.Path) -> None:
    with pytest.raises(BadRecording, match=r"held-out-0.safetensors is of a model without the head 7\.7"):
        measure_indexer(data, pathlib.Path("smollm2-135m-instruct"), 0.3, "cpu", Console(quiet=True))


def test_shipped_indexers_are_whole_and_small() -> None:
    import hashlib

    from sglang_lsa.indexer.checkpoint import SHIPPED

    assert shipped_indexers() == ["qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct", "smollm2-135m-instruct"]
    for name in shipped_indexers():
        config = MemoryIndexer.load(name).config
        kv_bytes = config.model.num_hidden_layers * config.model.kv_heads * config.model.head_dim * 2 * 2 * 64
        assert config.page_bytes < 0.01 * kv_bytes
        sums = dict(line.split()[::-1] for line in (SHIPPED / name / "SHA256SUMS").read_text().splitlines())
        assert set(sums) == {"config.json", "model.safetensors"}
        for file, digest in sums.items():
            content = (SHIPPED / name / file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest and len(content) < 16e6
        assert "license: apache-2.0" in (SHIPPED / name / "README.md").read_text()


# --- what is refused -------------------------------------------------------------------------------------------------


def change_entries(folder: pathlib.Path, **changed: Any) -> None:
    manifest = Manifest.open(folder)
    for entry in list(manifest.entries.values()):
        manifest.add(dataclasses.replace(entry, **changed))


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
        ("kv heads", "record into separate folders"),
        (
            "query heads",
            r"observed layers \(1, 3\) of 4 with 12 heads .* others .* with 6: record into separate folders",
        ),
        ("held-out width", "b.safetensors is of layers .* record into separate folders"),
        ("few", "too few to watch one of them"),
        ("short", "no recording of held-out is longer than a page"),
        ("evidence", "no training prompts with known evidence"),
        ("answers", "2 have answers before what was recorded .* 0 have evidence only beyond"),
        ("beyond", "0 have answers before what was recorded .* 2 have evidence only beyond their complete pages"),
    ],
)
def test_bad_data_is_refused(damage: str, words: str, tmp_path: pathlib.Path) -> None:
    if damage != "none":
        write(tmp_path, "a", "train", 1)
    if damage not in ("none", "split"):
        write(tmp_path, "b", "held-out", 2, head_dim=32 if damage == "held-out width" else 16)
        if damage != "few":
            write(tmp_path, "c", "train", 3, head_dim=32 if damage == "width" else 16)
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
        write(tmp_path, "c", "train", 3, queries=torch.full((9, 2, 6, 16), float("nan")))
    elif damage == "kv heads":
        write(tmp_path, "c", "train", 3, runs=torch.zeros((PAGES + 2, RUNS, 2, 3, 16)))
    elif damage == "query heads":
        write(tmp_path, "c", "train", 3, q_heads=12)
    elif damage == "short":
        write(tmp_path, "b", "held-out", 2, mass=torch.zeros((0, 24, PAGES + 2)))
    elif damage == "evidence":
        change_entries(tmp_path, evidence=())
    elif damage == "answers":
        change_entries(tmp_path, tokens=PAGES * 64 - 100, answer_tokens=50)
    elif damage == "beyond":
        change_entries(tmp_path, evidence=(PAGES + 9,))
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
        ({"coverage": 1.0}, "--coverage 1.0"),
        ({"evidence": 1.0}, "--evidence 1.0 is out of range: use a share of attention in"),
        ({"evidence": -0.1}, "--evidence -0.1"),
        ({"positions": 129}, "--positions 129 is too large: recordings have 128"),
        ({"learning_rate": float("inf")}, "--learning-rate inf"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainSettings(**changed)


def test_a_key_dim_that_does_not_fit_is_refused_before_training(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    settings = dataclasses.replace(QUICK, key_dim=64)
    with pytest.raises(ValueError, match="key_dim 64 does not fit heads of 16"):
        train(data, tmp_path / "out", settings, "cpu", Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"heads": []}, r"heads \(\) are not heads of"),
        ({"heads": [[4, 0]]}, "are not heads of"),
        ({"heads": [[1]]}, "is no indexer configuration"),
        ({"model": {"hidden_size": 9}}, "KeyError"),
        ({"model": {**dataclasses.asdict(SHAPE), "kv_heads": 0}}, "is no model: use numbers above 0"),
        ({"model": {**dataclasses.asdict(SHAPE), "kv_heads": 4}}, "query heads in equal groups"),
        ({"sub_keys": 3}, "sub_keys 3 does not divide a page's 32 parts"),
        ({"sub_keys": 0}, "sub_keys 0 does not divide"),
        ({"sub_keys": "8"}, "sub_keys is '8': use a whole number"),
        ({"key_dim": 7}, "key_dim 7 does not fit heads of 16"),
        ({"key_dim": 0}, "key_dim 0 does not fit"),
        ({"key_dim": 18}, "key_dim 18 does not fit"),
        ({"positions": 0}, "positions 0 is out of range: use 1 to 128"),
        ({"positions": 4096}, "positions 4096 is out of range"),
        ({"threshold": None}, "threshold is None: use a number"),
        ({"threshold": float("nan")}, "threshold nan is out of range"),
        ({"coverage": 1.5}, "coverage 1.5 is out of range: use 0 to 1"),
    ],
)
def test_bad_configurations_are_refused(changed: dict[str, Any], words: str, tmp_path: pathlib.Path) -> None:
    MemoryIndexer(IndexerConfig(SHAPE, (SEEKER,), key_dim=8)).save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=f"--lsa-indexer {tmp_path}: config.json .*{words}"):
        MemoryIndexer.load(tmp_path)


def test_bad_weights_are_refused(tmp_path: pathlib.Path) -> None:
    indexer = MemoryIndexer(IndexerConfig(SHAPE, (SEEKER,), key_dim=8))
    with torch.no_grad():
        indexer.query[0, 0, 0] = float("nan")
    indexer.save(tmp_path)
    with pytest.raises(ValueError, match=f"--lsa-indexer {tmp_path}: .* values in query that are no numbers"):
        MemoryIndexer.load(tmp_path)
    MemoryIndexer(IndexerConfig(SHAPE, (SEEKER,), key_dim=6)).save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit config\.json"):
        MemoryIndexer.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit config\.json"):
        MemoryIndexer.load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": "835"}, "tokens is '835', no count"),
        ({"tokens": True}, "tokens is True, no count"),
        ({"answer_tokens": -1}, "answer_tokens is -1, no count"),
        ({"bytes": 1.5}, "bytes is 1.5, no count"),
        ({"evidence": [0.5]}, "evidence is [0.5], no list of pages"),
        ({"evidence": [-1]}, "evidence is [-1], no list of pages"),
        ({"evidence": "12"}, "evidence is '12', no list of pages"),
        ({"split": None}, "split is None, no text"),
        ({"name": 7}, "name is 7, no text"),
        ({"name": "../elsewhere"}, "'../elsewhere' is no name of a recording in this folder"),
        ({"name": "/etc/elsewhere"}, "'/etc/elsewhere' is no name of a recording in this folder"),
        ({"name": ".."}, "'..' is no name of a recording in this folder"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
    ],
    ids=str,
)
def test_a_damaged_manifest_is_refused_before_anything_starts(
    changed: dict[str, Any], words: str, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    values = json.loads((data / "manifest.json").read_text())
    values["documents"][3] |= changed
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BadRecording, match=r"manifest\.json is damaged \(.*" + re.escape(words)):
        train(tmp_path, tmp_path / "out", QUICK, "cpu", Console(quiet=True))


@pytest.mark.parametrize("values", [[], {"format": 1, "model": 3, "documents": []}, {"format": 1, "documents": [4]}])
def test_a_manifest_of_another_form_is_refused(values: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BadRecording, match=r"manifest\.json is damaged"):
        Manifest.open(tmp_path)


def test_another_model_is_refused(data: pathlib.Path) -> None:
    with pytest.raises(BadRecording, match="use another --output"):
        Manifest.open(data, "some/other-model")


def test_evidence_counts_where_the_whole_answer_lies_ahead(data: pathlib.Path) -> None:
    known = load_recordings(data, "held-out", [SEEKER])[0]
    evidence = list(known.entry.evidence)
    for answer, asked in ((64, {4}), (48, {4, 5}), (80, set())):  # of 128 recorded tokens, which begin at block 0
        recording = dataclasses.replace(known, entry=dataclasses.replace(known.entry, answer_tokens=answer))
        for block in range(BLOCKS):
            label, wanted = recording.label(block), recording.wanted(block, 0.5)
            ahead = block in asked
            assert torch.equal(wanted[evidence], label[evidence].clamp(min=0.5) if ahead else label[evidence])
            others = [page for page in range(len(label)) if page not in evidence]
            assert torch.equal(wanted[others], label[others])
            assert torch.equal(recording.wanted(block, 0.0), label)
    batches = Batches([dataclasses.replace(known, entry=dataclasses.replace(known.entry, answer_tokens=64))], 16, 6)
    batches.evidence = 0.9
    assert int((batches(batches.rows())["label"] == 0.9).sum()) >= len(evidence) - 1
