"""``sglang-lsa recall``: a trained indexer on held-out recordings, as rows of a results file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_lsa.indexer.checkpoint import checkpoint_folder, write_config
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.indexer.manifest import Manifest
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.provenance import command_line, commit, hardware
from sglang_lsa.training.calibrate import describe, expect
from sglang_lsa.training.data import load_recordings
from sglang_lsa.training.recall import Rules, measure, recall_table, summarise
from sglang_lsa.training.sizes import measure_sizes, sizes_table, summarise_sizes

TARGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
"""Shares of attention for which a calibration says what they take."""


def measure_indexer(
    data: pathlib.Path,
    checkpoint: pathlib.Path,
    golden: float,
    device: str,
    console: Console,
    *,
    name: str | None = None,
    output: pathlib.Path | None = None,
) -> list[dict[str, Any]]:
    """Recall of the indexer and of the policies beside it, printed, and added to a file.

    Args:
        name: of the model; None takes what it was recorded from.
        output: JSON list; rows of the same model are replaced.

    Returns:
        Rows ``model, family, length, selector, budget, recall, mass, evidence, told, n``, see ``recall.measure``.

    Raises:
        ValueError: the checkpoint or the recordings cannot be used, or are of different models.
    """
    indexer = MemoryIndexer.load(checkpoint).to(device)
    held_out = load_recordings(data, "held-out", indexer.config.heads)
    indexer.config.require_model(held_out[0].shape, f"--indexer {checkpoint}")
    rows = measure(held_out, indexer, Rules(golden), device=device)
    console.print(recall_table(rows))
    model = name or Manifest.open(data).model
    found = [{"model": model, **row} for row in by_length(rows)]
    if output is not None:
        kept = [row for row in json.loads(output.read_text()) if row["model"] != model] if output.exists() else []
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("[\n" + ",\n".join(json.dumps(row) for row in [*kept, *found]) + "\n]\n")
    return found


def calibrate_indexer(
    data: pathlib.Path, checkpoint: pathlib.Path, split: str, golden: float, device: str, console: Console
) -> Expectation:
    """Measure what sets of a trained indexer cover and write that into its ``config.json``; all else of it stays.

    Raises:
        ValueError: the checkpoint or the recordings cannot be used, or are of different models.
    """
    indexer = MemoryIndexer.load(checkpoint).to(device)
    recordings = load_recordings(data, split, indexer.config.heads)
    indexer.config.require_model(recordings[0].shape, f"--indexer {checkpoint}")
    found = expect(recordings, indexer, Rules(golden), describe(recordings, split), device)
    write_config(checkpoint_folder(checkpoint), dataclasses.replace(indexer.config, expectation=found))
    table = Table("covers", "told", "pages", title=f"what a set takes to cover so much, by {found.source}")
    for target in TARGETS:
        table.add_row(f"{target:g}", f"{found.told_for(target):.3f}", f"{found.pages_for(target):.1%}")
    console.print(table)
    return found


def measure_set_sizes(
    data: pathlib.Path,
    checkpoint: pathlib.Path,
    budgets: Sequence[float],
    targets: Sequence[float],
    golden: float,
    device: str,
    console: Console,
    output: pathlib.Path | None = None,
) -> list[dict[str, Any]]:
    """Fixed budgets beside targets on held-out recordings, printed, and written to a file: ``all`` documents, those
    of a ``family`` and those of a ``length``.

    Raises:
        ValueError: see ``sizes.measure_sizes`` and :func:`measure_indexer`.
    """
    indexer = MemoryIndexer.load(checkpoint).to(device)
    held_out = load_recordings(data, "held-out", indexer.config.heads)
    indexer.config.require_model(held_out[0].shape, f"--indexer {checkpoint}")
    rows = measure_sizes(held_out, indexer, budgets=budgets, targets=targets, golden=golden, device=device)
    console.print(sizes_table(rows))
    sized = [{**row, "length": 1 << (row["tokens"] - 1).bit_length()} for row in rows]
    found = [row for by in ((), ("length",), ("family",)) for row in summarise_sizes(sized, by)]
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        about = {"command": command_line(), "commit": commit(), "hardware": hardware(), "indexer": checkpoint.name}
        output.write_text(json.dumps(about | {"rows": found}, indent=1) + "\n")
    return found


def by_length(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means by family and length; a length is the next power of two."""
    sized = [{**row, "length": 1 << (row["tokens"] - 1).bit_length()} for row in rows]
    return summarise(sized, ("family", "length", "selector", "budget"))
