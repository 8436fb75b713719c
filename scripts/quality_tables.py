"""Tables of docs/evaluation.md, from the rows of quality.json and quality-60.json. See figures.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
NAMES = {4096: "4K", 8192: "8K", 16384: "16K", 32000: "32,000"}
INDEXER, ALONE = "lsa_look", "lsa"
"""Arms: the indexer with prompt lookup, which is the default, and without."""


def ruler_60(rows: Sequence[Row]) -> str:
    """Averages of 60 samples, with their differences to full attention."""
    lines = table("arm", "budget", *(cell for length in (16384, 32000) for cell in (NAMES[length], "difference")))
    arms = [("full", "full", 1.0), ("indexer", INDEXER, 0.1), ("", INDEXER, 0.12)]
    arms += [("the same without prompt lookup", ALONE, 0.1), ("Quest", "quest", 0.1)]
    for label, arm, budget in arms:
        found = [average(rows, length, arm, budget) for length in (16384, 32000)]
        lines.append(line(label, percent(budget), *(cell for row in found for cell in (with_memory(row), apart(row)))))
    return "\n".join(lines)


def ruler(rows: Sequence[Row]) -> str:
    """Averages of 20 samples by length."""
    lines = table("arm", "budget", *NAMES.values())
    arms = [("full", "full", 1.0)]
    for label, arm in (("indexer", INDEXER), ("Quest", "quest")):
        arms += [(label if budget == 0.2 else "", arm, budget) for budget in (0.2, 0.12, 0.1, 0.06)]
    for label, arm, budget in arms:
        found = [average(rows, length, arm, budget) for length in NAMES]
        if (arm, budget) == (INDEXER, 0.06):  # long contexts were asked without prompt lookup alone
            found = [row or average(rows, length, ALONE, budget) for length, row in zip(NAMES, found, strict=True)]
        lines.append(line(label, percent(budget), *map(with_memory, found)))
    for label, arm in (("sliding window", "window"), ("random", "random"), ("recency", "recency")):
        accuracies = [f"{average(rows, length, arm, 0.1)['accuracy']:.1f}" for length in NAMES]  # type: ignore[index]
        lines.append(line(label, percent(0.1), *accuracies))
    return "\n".join(lines)


def differences(rows: Sequence[Row]) -> str:
    """Of the indexer to full attention, by budget."""
    lines = table("budget", "4K", "8K")
    for budget in (0.2, 0.12, 0.1, 0.06):
        cells = (apart(average(rows, length, INDEXER, budget)) for length in (4096, 8192))
        lines.append(line(percent(budget), *cells))
    return "\n".join(lines)


def average(rows: Sequence[Row], length: int, arm: str, budget: float) -> Row | None:
    """Over RULER's tasks; None where it was not measured."""
    where = {"model": MODEL, "suite": "ruler", "task": "average", "length": length, "arm": arm, "budget": budget}
    found = [row for row in rows if all(row[key] == value for key, value in where.items())]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows are of {where}: leave one")
    return found[0] if found else None


def with_memory(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['accuracy']:.1f}" + ("" if row["arm"] == "full" else f" ({row['footprint'] * 100:.1f} %)")


def apart(row: Row | None) -> str:
    if row is None or row["arm"] == "full":
        return ""
    return f"{row['delta']:+.1f} ({row['delta_ci_low']:+.1f} to {row['delta_ci_high']:+.1f})"


def percent(budget: float) -> str:
    return "" if budget == 1.0 else f"{budget * 100:.0f} %"


def table(*names: str) -> list[str]:
    return [line(*names), line(*("---" for _ in names))]


def line(*cells: str) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
