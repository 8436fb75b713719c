"""Training on recordings made here: pages that a query names must be found, others not; and results."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers")

from made_recordings import LAYERS, QUICK, SEEKER, one_thread_only, write_all
from rich.console import Console

from sglang_lsa.config import LSAConfig
from sglang_lsa.indexer.checkpoint import shipped_indexers
from sglang_lsa.indexer.heads import retrieval_heads
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.indexer.recording import BadRecording
from sglang_lsa.training.calibrate import calibrate, with_threshold
from sglang_lsa.training.data import load_recordings
from sglang_lsa.training.recall import Rules, measure, predict, summarise
from sglang_lsa.training.results import calibrate_indexer, measure_indexer, measure_set_sizes
from sglang_lsa.training.settings import TrainSettings
from sglang_lsa.training.train import config_for, split_off, train


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_thread_only():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_all(tmp_path_factory.mktemp("recordings"))


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
