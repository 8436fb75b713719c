"""Tables of docs/evaluation.md of the larger model, of widened sets of both, and of SmolLM2's. See figures.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quality_tables import MODEL as SMALLER
from quality_tables import NAMES, about, apart, at, line, measured, percent, selected, table, with_memory

Row = dict[str, Any]
MODEL = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
ARMS = {"full": "full", "indexer": "lsa", "indexer, `auto`": "lsa_auto", "Quest": "quest"}
"""But for full attention with a budget of 10 %, which rows of ``auto`` say, too, as it is what the arm was named by."""
SHORT = {4096: "4K", 8192: "8K", 16384: "16K"}
SMALLEST = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODELS = {SMALLER: "0.5B", MODEL: "1.5B"}
CALIBRATIONS = (
    ("full, of the trained indexer's server", "full"),
    ("trained indexer", "lsa"),
    ("the same, an earlier run", "lsa_before"),
    ("8 heads", "lsa_calibrated8"),
    ("16 heads", "lsa_calibrated16"),
    ("the same, an earlier run", "lsa_calibrated16_before"),
    ("32 heads", "lsa_calibrated32"),
    ("**16 heads and the ends of pages**, as served", "lsa_calibrated"),
)
SELECTORS = {"trained indexer": "lsa", "calibrated at start": "lsa_calibrated", "Quest": "quest"}


def averages(rows: Sequence[Row]) -> str:
    """Over RULER's tasks that count, by length, with differences to full attention; blank: not asked."""
    lines = table("", *NAMES.values())
    found = {label: [_average(rows, arm, length) for length in NAMES] for label, arm in ARMS.items()}
    counts = (_of(rows, "full", "average", length) for length in NAMES)
    lines.append(line("tasks that count, questions", *(f"{row['tasks']}, {row['n']}" for row in counts)))
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


def arms(rows: Sequence[Row]) -> str:
    """Trained at two shares and as large as needed, calibrated and Quest, at 16K and 32,000; blank where not asked."""
    lines = table("20 questions of each task", *(cell for name in ("16K", "32,000") for cell in (name, "difference")))
    shown = [("full", "full", 1.0), ("trained indexer, 10 %", "lsa", 0.1), ("the same, 13.5 %", "lsa", 0.135)]
    shown += [("the same, `auto`", "lsa_auto", 0.1), ("calibrated at start, 10 %", "lsa_calibrated", 0.1)]
    for label, arm, budget in [*shown, ("Quest, 10 %", "quest", 0.1)]:
        found = [_average(rows, arm, length, budget=budget) for length in (16384, 32000)]
        lines.append(line(label, *(cell for row in found for cell in (with_memory(row), apart(row)))))
    return "\n".join(lines)


def curve(rows: Sequence[Row]) -> str:
    """KL and bytes by budget, at 16K. Without accuracies: the arms of a question were answered in groups."""
    budgets = (0.05, 0.1, 0.2)
    full = _of(rows, "full", "average", 16384)
    lines = table(f"KL; bytes (full: {full['kl']:.4f})", *map(percent, budgets), "`auto`")
    for label, arm in {**SELECTORS, "window": "window"}.items():
        found = [_average(rows, arm, 16384, budget=budget) for budget in budgets]
        found.append(_average(rows, f"{arm}_auto", 16384))
        lines.append(line(label, *(f"{_kl(row, 2)}; {_bytes(row)}" if row else "" for row in found)))
    return "\n".join(lines)


def memory(rows: Sequence[Row]) -> str:
    """Questions about what an agent has kept, by length."""
    shown = {"full": "full", "indexer": "lsa", "Quest": "quest", "window": "window"}
    lines = table("", *shown)
    for length, name in SHORT.items():
        place = {"model": MODEL, "suite": "agentic", "task": "memory", "length": length}
        found = [measured(rows, **at(arm), **place) for arm in shown.values()]
        told = ("lsa", "quest") if length > 4096 else ()  # one user's answers have no interval
        cells = [f"{row['accuracy']:.1f}" + (about(row) if row["arm"] in told else "") for row in found]
        lines.append(line(f"{name}, {found[0]['n']} questions", *cells))
    return "\n".join(lines)


def smallest(rows: Sequence[Row]) -> str:
    """SmolLM2 at 8,000: trained and calibrated, on the same questions."""
    lines = table("8,000, budget 12 %", "points", "difference to full attention")
    for label, arm in {"full": "full", "trained indexer": "lsa", "calibrated at start": "lsa_calibrated"}.items():
        row = measured(rows, model=SMALLEST, suite="ruler", task="average", length=8000, arm=arm)
        lines.append(line(label, with_memory(row), apart(row)))
    return "\n".join(lines)


def calibrations(rows: Sequence[Row]) -> str:
    """A trained indexer and several ways of calibrating, with both Qwen models, at 16K and 32,000; blank: not asked."""
    places = [(model, name, length) for model, name in MODELS.items() for length in (16384, 32000)]
    lines = table("budget 10 %", *(f"{name}, {NAMES[length]}" for _, name, length in places))
    for label, arm in CALIBRATIONS:
        cells = []
        for model, _, length in places:
            where = {"model": model, "suite": "ruler", "task": "average", "length": length}
            full = measured(rows, arm="full", **where)
            row = full if arm == "full" else selected(rows, arm=arm, budget=0.1, **where)
            told = [with_memory(row)]
            if row and row is not full:
                told.append(apart(row))
            if row and (row is full or row["n"] != full["n"]):
                told.append(f"{row['n']} questions")
            cells.append("; ".join(told))
        lines.append(line(label, *cells))
    return "\n".join(lines)


def kl(rows: Sequence[Row]) -> str:
    """Trained, as large as needed, calibrated and Quest, at 16K: points, bytes, and how far from full attention."""
    lines = table("16K, 20 questions of each task", "points", "difference to full attention of the same server", "KL")
    shown = {"full": "full", "trained indexer": "lsa", "the same, `auto`": "lsa_auto"}
    shown |= {"calibrated at start": "lsa_calibrated", "Quest": "quest"}
    for label, arm in shown.items():
        row = _of(rows, arm, "average", 16384)
        lines.append(line(label, with_memory(row), apart(row), _kl(row, 4 if arm == "full" else 2)))
    return "\n".join(lines)


def qmsum(rows: Sequence[Row]) -> str:
    """Questions about meetings: KL, evidence that people marked, bytes."""
    shown = {"full": "full", "indexer": "lsa", "Quest": "quest", "window": "window"}
    lines = table("KL; evidence kept; bytes", *shown)
    for length in (16384, 32000):
        place = {"model": MODEL, "suite": "qmsum", "task": "meeting", "length": length}
        found = [measured(rows, arm=arm, **place) for arm in shown.values()]
        cells = [_kl(row, 4) if row["arm"] == "full" else f"{_kl(row, 2)}; {_kept(row)}" for row in found]
        lines.append(line(f"up to {NAMES[length]}, {found[0]['n']} questions", *cells))
    return "\n".join(lines)


def widen(larger: Sequence[Row], smaller: Sequence[Row]) -> str:
    """Copies and lists, by how many times their budget sets may have; blank where that was not asked."""
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


def copies(rows: Sequence[Row]) -> str:
    """Copies of 16K and lists of 4K, by budget, ``widen`` and ``dense_steps``."""
    lines = table("", "copies, 16K", "lists, 4K")
    shown = [("full", "full", 1.0)]
    for budget in (0.135, 0.2):
        shown += [(f"{budget * 100:g} %", "lsa", budget), ("the same, `widen` 4", "lsa_w4", budget)]
        shown += [("the same, `dense_steps` 32", "lsa_d32", budget)]
    for label, arm, budget in shown:
        places = (("passage", 16384), ("listing", 4096))
        found = [
            measured(rows, model=MODEL, suite="longgen", task=task, length=length, arm=arm, budget=budget)
            for task, length in places
        ]
        cells = [f"{row['accuracy']:.1f}" + ("" if arm == "full" else f"{about(row)}, {_bytes(row)}") for row in found]
        lines.append(line(label, *cells))
    return "\n".join(lines)


def _of(rows: Sequence[Row], arm: str, task: str, length: int) -> Row:
    return measured(rows, model=MODEL, suite="ruler", arm=arm, task=task, length=length)


def _average(rows: Sequence[Row], arm: str, length: int, **where: Any) -> Row | None:
    return selected(rows, model=MODEL, suite="ruler", task="average", arm=arm, length=length, **where)


def _kl(row: Row, decimals: int) -> str:
    low, high = (f"{row[key]:.{decimals}f}" for key in ("kl_ci_low", "kl_ci_high"))
    return f"{row['kl']:.{decimals}f} ({low} to {high})"


def _kept(row: Row) -> str:
    return f"{row['evidence_kept']:.2f}; {_bytes(row)}"


def _bytes(row: Row) -> str:
    return f"{row['footprint'] * 100:.1f} %"
