"""What training an indexer takes of a GPU: documents of 32K tokens and 24 layers, random, in real shapes."""

from __future__ import annotations

import pathlib

import pytest
import torch

pytest.importorskip("sentence_transformers")

from rich.console import Console

from sglang_lsa.config import RECORDED_POSITIONS, RUNS
from sglang_lsa.indexer.manifest import Entry, Manifest
from sglang_lsa.indexer.recording import BLOCK, write_recording
from sglang_lsa.training.settings import TrainSettings
from sglang_lsa.training.train import train

LAYERS, MODEL_LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = (9, 11, 13, 16), 24, 14, 2, 64
TOKENS, LAST = 32_000, 512


def write(folder: pathlib.Path, manifest: Manifest, name: str, split: str) -> None:
    pages, blocks = TOKENS // 64, LAST // BLOCK
    tensors = {
        "input_ids": torch.zeros(TOKENS, dtype=torch.int32),
        "queries": torch.randn((RECORDED_POSITIONS + LAST, len(LAYERS), Q_HEADS, HEAD_DIM)).bfloat16(),
        "runs": torch.randn((pages, RUNS, len(LAYERS), KV_HEADS, HEAD_DIM)).bfloat16(),
        "mass": torch.rand((blocks, MODEL_LAYERS * Q_HEADS, pages)).pow(8).half(),
        "quest": torch.rand((blocks, pages)).half(),
        "mean_key": torch.rand((blocks, pages)).half(),
    }
    facts = {
        "prompt_tokens": TOKENS,
        "tokens": TOKENS,
        "start": TOKENS - LAST,
        "first": TOKENS - LAST - RECORDED_POSITIONS,
        "layers": list(LAYERS),
        "model_layers": MODEL_LAYERS,
        "hidden_size": 896,
        "q_heads": Q_HEADS,
    }
    path = folder / f"{name}.safetensors"
    write_recording(path, tensors, facts)
    manifest.add(Entry(name, "random", split, name, TOKENS, LAST, (7, 70, 300), path.stat().st_size))


def test_training_takes_less_than_2_gb(tmp_path: pathlib.Path) -> None:
    """With the settings of a user who gives none; all of what the process has reserved counts."""
    manifest = Manifest.open(tmp_path, "random/model")
    for number in range(20):
        write(tmp_path, manifest, f"train-{number}", "train")
    for number in range(2):
        write(tmp_path, manifest, f"held-out-{number}", "held-out")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    train(tmp_path, tmp_path / "indexer", TrainSettings(steps=12), "cuda", Console(quiet=True))
    taken = (torch.cuda.max_memory_reserved() - before) / 1e9
    print(f"\ntraining reserved {taken:.2f} GB, used {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    assert taken < 2
