"""``sglang-lsa recall``: a trained indexer on held-out recordings, as rows of a results file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from sglang_lsa.indexer.manifest import Manifest
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.training.data import load_recordings
from sglang_lsa.training.recall import Rules, measure, recall_table, summarise


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
    indexer.config.require_model(held_out[0].shape)
    rows = measure(held_out, indexer, Rules(golden), device=device)
    console.print(recall_table(rows))
    model = name or Manifest.open(data).model
    found = [{"model": model, **row} for row in by_length(rows)]
    if output is not None:
        kept = [row for row in json.loads(output.read_text()) if row["model"] != model] if output.exists() else []
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("[\n" + ",\n".join(json.dumps(row) for row in [*kept, *found]) + "\n]\n")
    return found


def by_length(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means by family and length; a length is the next power of two."""
    sized = [{**row, "length": 1 << (row["tokens"] - 1).bit_length()} for row in rows]
    return summarise(sized, ("family", "length", "selector", "budget"))
