"""Recordings, settings, configurations and weights that cannot be trained on, measured or served."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers")

from made_recordings import PAGES, QUICK, SEEKER, SHAPE, one_thread_only, write, write_all
from rich.console import Console

from sglang_lsa.config import RUNS
from sglang_lsa.indexer.checkpoint import IndexerConfig
from sglang_lsa.indexer.manifest import Manifest
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.indexer.recording import BadRecording
from sglang_lsa.training.settings import TrainSettings
from sglang_lsa.training.train import train


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_thread_only():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_all(tmp_path_factory.mktemp("recordings"))


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
        ({"overlap": -1}, "overlap -1 is out of range: use 0 to 32, the sub_keys of a page"),
        ({"overlap": 33}, "overlap 33 is out of range"),
        ({"overlap": None}, "overlap is None: use a whole number"),
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
