"""Recordings made without a model: of what comes next, one head's queries name the pages that are needed."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from sglang_lsa.config import RUNS
from sglang_lsa.indexer.checkpoint import ModelShape
from sglang_lsa.indexer.manifest import Entry, Manifest
from sglang_lsa.indexer.recording import BLOCK, write_recording
from sglang_lsa.training.settings import TrainSettings

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


def write_all(folder: pathlib.Path) -> pathlib.Path:
    """40 to train on, and 6 that are held out."""
    for number in range(40):
        write(folder, f"train-{number}", "train", number)
    for number in range(6):
        write(folder, f"held-out-{number}", "held-out", 1000 + number)
    return folder


@contextlib.contextmanager
def one_thread_only() -> Iterator[None]:
    """The tensors are so small that threads only wait for each other: minutes where another process needs a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
