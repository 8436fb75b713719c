"""The model card of a trained indexer: what it is for, what it was trained on, and how much it finds."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.training.data import Recording
from sglang_lsa.training.recall import COLUMNS, recall_cells


def write_card(
    folder: pathlib.Path,
    model: str,
    settings: Mapping[str, Any],
    indexer: MemoryIndexer,
    training: Sequence[Recording],
    held_out: Sequence[Recording],
    rows: Sequence[dict[str, Any]],
    seconds: float,
    device: str,
) -> None:
    """Write ``README.md`` beside the weights; ``model`` is what was recorded."""
    config = indexer.config
    parameters = sum(value.numel() for value in indexer.parameters())
    heads = ", ".join(f"{layer}.{head}" for layer, head in config.heads)
    lines = [
        "---",
        "library_name: sglang-lsa",
        "tags: [sglang-lsa, memory-indexer, sentence-transformers]",
        "---",
        f"# Memory indexer for {pathlib.Path(model).name if pathlib.Path(model).is_absolute() else model}",
        "",
        f"For a model with {config.model.num_hidden_layers} layers of width {config.model.hidden_size}. It reads the "
        f"queries and keys of these heads (layer.head): {heads}. {parameters:,} parameters; the keys of a page of "
        f"{PAGE_SIZE} tokens take {config.page_bytes:,} bytes. Pages that score above {config.threshold:.4g} got "
        f"{config.coverage:.0%} of the heads' attention on documents not trained on. Serve with it: `--lsa-indexer "
        "FOLDER`.",
        "",
        "## Training",
        "",
        f"{len(training)} recordings, {len(held_out)} held out by source document. The model itself was not loaded. "
        f"{seconds:.0f} s on {device}.",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
        f"Recordings by family: {families(training)}.",
        "",
        "Prompts are made by `sglang-lsa record`: running text, and tasks whose words and sentences are its own, with "
        "others in held-out prompts. Nothing of an evaluation suite is among them.",
        "",
        "## Held-out recall",
        "",
        "Share of the pages that are kept among those to which these heads pay, on average of the largest share of "
        f"each in the next 64 tokens, at least {settings['golden']:.0%} of their attention; pages that every policy "
        "keeps do not count.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
        *(f"| {' | '.join(cells)} |" for cells in recall_cells(rows)),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def families(recordings: Sequence[Recording]) -> str:
    """How many there are of each."""
    counts = Counter(recording.entry.family for recording in recordings)
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
