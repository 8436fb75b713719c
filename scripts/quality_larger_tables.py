"""Tables of docs/evaluation.md of the larger model, and of widened sets of both. See figures.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quality_tables import MODEL as SMALLER
from quality_tables import NAMES, about, apart, line, measured, selected, table, with_memory

Row = dict[str, Any]
MODEL = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
ARMS = {"full": "full", "indexer": "lsa", "indexer, `auto`": "lsa_auto", "Quest": "quest"}
"""But for full attention with a budget of 10 %, which rows of ``auto`` say, too, as it is what the arm was named by."""
SHORT = {4096: "4K", 8192: "8K", 16384: "16K"}


def averages(rows: Sequence[Row]) -> str:
    """Over RULER's tasks that count, by length, with differences to full attention."""
    lines = table("", *NAMES.values())
    found = {label: [_of(rows, arm, "average", length) for length in NAMES] for label, arm in ARMS.items()}
    lines.append(line("tasks that count, questions", *(f"{row['tasks']}, {row['n']}" for row in found["full"])))
    for label, own in found.items():
        lines.append(line(label, *map(with_memory, own)))
        if label != "full":
            lines.append(line("difference", *map(apart, own)))
    return "\n".join(lines)


def tasks(rows: Sequence[Row]) -> str:
    """Each task at 16K and 32,000."""
    lengths = (16384, 32000)
    lines = table("task", *(f"{NAMES[length]}: {label}" for length in lengths for label in ARMS))
    names = dict.fromkeys(row["task"] for row in rows if row["suite"] == "ruler" and row["task"] != "average")
    for name in names:
        cells = []
        for length in lengths:
            for arm in ARMS.values():
                row = _of(rows, arm, name, length)
                mark = "" if row["counted"] or arm != "full" else " *"
                cells.append(f"{row['accuracy']:.1f}{mark}" + (about(row) if arm == "lsa" else ""))
        lines.append(line(f"`{name}`", *cells))
    return "\n".join(lines)


def kl(rows: Sequence[Row]) -> str:
    """Trained, as large as needed, calibrated and Quest, at 16K: points, bytes, and how far from full attention."""
    lines = table("16K, 20 questions of each task", "points", "difference to full attention of the same server", "KL")
    arms = {"full": "full", "trained indexer": "lsa", "the same, `auto`": "lsa_auto"}
    arms |= {"calibrated at start": "lsa_calibrated", "Quest": "quest"}
    for label, arm in arms.items():
        row = _of(rows, arm, "average", 16384)
        lines.append(line(label, with_memory(row), apart(row), _kl(row, 4 if arm == "full" else 2)))
    return "\n".join(lines)


def qmsum(rows: Sequence[Row]) -> str:
    """Questions about meetings: KL, evidence that people marked, bytes."""
    arms = {"full": "full", "indexer": "lsa", "Quest": "quest", "window": "window"}
    lines = table("KL; evidence kept; bytes", *arms)
    for length in (16384, 32000):
        place = {"model": MODEL, "suite": "qmsum", "task": "meeting", "length": length}
        found = [measured(rows, arm=arm, **place) for arm in arms.values()]
        cells = [_kl(row, 4) if row["arm"] == "full" else f"{_kl(row, 2)}; {_kept(row)}" for row in found]
        lines.append(line(f"up to {NAMES[length]}, {found[0]['n']} questions", *cells))
    return "\n".join(lines)


def widen(larger: Sequence[Row], smaller: Sequence[Row]) -> str:
    """Copies and lists, by how many times their budget sets may have."""
    lines = table("budget 10 %", "full", "`widen` 1", "2", "3")
    for model, rows in ((MODEL, larger), (SMALLER, smaller)):
        for task in ("passage", "listing"):
            for length, name in SHORT.items():
                place = {"model": model, "suite": "longgen", "task": task, "length": length}
                full = measured(rows, arm="full", **place)
                mark = "" if full["counted"] else " *"
                found = [selected(rows, arm=f"lsa_w{times}", **place) for times in (1, 2, 3)]
                cells = [f"{row['accuracy']:.1f}{about(row)}, {_bytes(row)}" if row else "" for row in found]
                label = f"{model.split('-')[2]}, `{task}`, {name}"
                lines.append(line(label, f"{full['accuracy']:.1f}{mark}", *cells))
    return "\n".join(lines)


def _of(rows: Sequence[Row], arm: str, task: str, length: int) -> Row:
    return measured(rows, model=MODEL, suite="ruler", arm=arm, task=task, length=length)


def _kl(row: Row, decimals: int) -> str:
    low, high = (f"{row[key]:.{decimals}f}" for key in ("kl_ci_low", "kl_ci_high"))
    return f"{row['kl']:.{decimals}f} ({low} to {high})"


def _kept(row: Row) -> str:
    return f"{row['evidence_kept']:.2f}; {_bytes(row)}"


def _bytes(row: Row) -> str:
    return f"{row['footprint'] * 100:.1f} %"
