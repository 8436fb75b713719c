"""Tables of docs/evaluation.md, from the rows of quality.json and quality-60.json. See figures.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
NAMES = {4096: "4K", 8192: "8K", 16384: "16K", 32000: "32,000"}
INDEXER, ALONE = "lsa_look", "lsa"
"""Arms: the indexer with prompt lookup, which is the default, and without."""
INDEXER_OF_A_SERVER = "lsa"
"""The arm with what a server does by itself: since prompt lookup is the default, with it."""


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


def fp8(rows: Sequence[Row]) -> str:
    """KV in FP8, with and without every page, averages at 16K."""
    lines = table("KV in FP8, 16K", "points", "difference to full attention in FP8")
    arms = {"full": "full", "indexer": INDEXER_OF_A_SERVER, "Quest": "quest", "random": "random", "recency": "recency"}
    return "\n".join([*lines, *_averages(rows, arms)])


def calibrated(rows: Sequence[Row]) -> str:
    """Heads found without training beside a trained indexer, averages at 16K."""
    lines = table("16K, budget 10 %", "points", "difference to full attention of the same server")
    arms = {"trained indexer": INDEXER_OF_A_SERVER, "calibrated at start": "lsa_calibrated", "Quest": "quest"}
    return "\n".join([*lines, *_averages(rows, arms)])


def _averages(rows: Sequence[Row], arms: dict[str, str]) -> list[str]:
    found = {label: average(rows, 16384, arm, 1.0 if arm == "full" else 0.1) for label, arm in arms.items()}
    return [line(label, with_memory(row), apart(row)) for label, row in found.items()]


def differences(rows: Sequence[Row]) -> str:
    """Of the indexer to full attention, by budget."""
    lines = table("budget", "4K", "8K")
    for budget in (0.2, 0.12, 0.1, 0.06):
        cells = (apart(average(rows, length, INDEXER, budget)) for length in (4096, 8192))
        lines.append(line(percent(budget), *cells))
    return "\n".join(lines)


def mrcr(rows: Sequence[Row]) -> str:
    """Texts to be repeated, at 4K."""
    places = [{"suite": "mrcr", "task": task, "length": 4096} for task in ("1needle", "2needle")]
    lines = table("`mrcr` at 4K: 3 to 4 windows", "one text", "one of two")
    lines.append(of_arm(rows, places, "full", "full", 1.0))
    lines.append(of_arm(rows, places, "**indexer, `dense_steps` 16**", "lsa_denselook", 0.12, "bold interval memory"))
    lines.append(of_arm(rows, places, "the same without prompt lookup", "lsa_dense", 0.12, "memory"))
    lines.append(of_arm(rows, places, "the same with reading ahead instead", "lsa_denseahead", 0.12, "interval memory"))
    lines.append(of_arm(rows, places, "indexer", INDEXER, 0.12, "memory"))
    return "\n".join([*lines, without_indexer(rows, places)])


def passage(rows: Sequence[Row]) -> str:
    """A passage to be repeated, by length."""
    places = [{"suite": "longgen", "task": "passage", "length": length} for length in (4096, 8192, 16384)]
    lines = table("`passage`: 600 to 650 tokens, 9 to 11 windows", "4K", "8K", "16K")
    lines.append(of_arm(rows, places, "full", "full", 1.0))
    told = "bold interval memory"
    lines.append(of_arm(rows, places, "**indexer**", INDEXER, 0.12, told, 1))
    lines.append(of_arm(rows, places, "**indexer, `dense_steps` 16**", "lsa_denselook", 0.12, told, 1))
    lines.append(of_arm(rows, places, "indexer, budget 25 %", INDEXER, 0.25, "interval"))
    lines.append(of_arm(rows, places, "without prompt lookup", ALONE, 0.12))
    lines.append(of_arm(rows, places, "with reading ahead instead", "lsa_ahead", 0.12))
    return "\n".join([*lines, without_indexer(rows, places)])


def kv(rows: Sequence[Row]) -> str:
    """Five questions about one context, by length."""
    arms = {"full": "full", "evidence": "evidence", "indexer": INDEXER, "without sharing": "lsa_apart"}
    arms |= {"Quest": "quest", "random": "random", "window": "window", "recency": "recency"}
    lines = table("length", *arms)
    for length in (4096, 8192):
        place = {"suite": "scbench", "task": "kv", "length": length}
        found = {name: measured(rows, **at(arm), **place) for name, arm in arms.items()}
        cells = [f"{row['accuracy']:.0f}" + (about(row) if name == "indexer" else "") for name, row in found.items()]
        lines.append(line(NAMES[length], *cells))
    return "\n".join(lines)


def memory(rows: Sequence[Row]) -> str:
    """Questions about what an agent has kept, by length."""
    arms = {"full": "full", "indexer": INDEXER, "Quest": "quest"}
    arms |= {"window": "window", "recency": "recency", "random": "random"}
    lines = table("", *arms)
    for length in (4096, 8192, 16384):
        place = {"suite": "agentic", "task": "memory", "length": length}
        found = [measured(rows, **at(arm), **place) for arm in arms.values()]
        told = (INDEXER, "quest") if length > 4096 else ()  # one user's answers have no interval
        cells = [f"{row['accuracy']:.1f}" + (about(row) if row["arm"] in told else "") for row in found]
        lines.append(line(f"{NAMES[length]}, {found[0]['n']} questions", *cells))
    return "\n".join(lines)


def at(arm: str) -> Row:
    return {"arm": arm, "budget": 1.0 if arm == "full" else 0.12}


def about(row: Row) -> str:
    return f" ({row['delta_ci_low']:+.0f} to {row['delta_ci_high']:+.0f})"


def of_arm(
    rows: Sequence[Row],
    places: Sequence[Row],
    label: str,
    arm: str,
    budget: float,
    told: str = "",
    decimals: int = 0,
) -> str:
    """A line of accuracies. ``told``: ``bold``, and in brackets ``interval`` and ``memory``, of so many decimals."""
    cells = []
    for place in places:
        row = measured(rows, arm=arm, budget=budget, **place)
        cell = f"**{row['accuracy']:.1f}**" if "bold" in told else f"{row['accuracy']:.1f}"
        brackets = [f"{row['delta_ci_low']:+.1f} to {row['delta_ci_high']:+.1f}"] if "interval" in told else []
        brackets += [f"{row['footprint'] * 100:.{decimals}f} %"] if "memory" in told else []
        cells.append(f"{cell} ({', '.join(brackets)})" if brackets else cell)
    return line(label, *cells)


def without_indexer(rows: Sequence[Row], places: Sequence[Row]) -> str:
    arms = ("quest", "window", "random")
    found = ([measured(rows, arm=arm, budget=0.12, **place)["accuracy"] for arm in arms] for place in places)
    return line("Quest; window; random", *("; ".join(f"{value:.1f}" for value in values) for values in found))


def measured(rows: Sequence[Row], **where: Any) -> Row:
    """The one row of :data:`MODEL` with these values."""
    found = selected(rows, **where)
    if found is None:
        raise ValueError(f"no row is of {where}: measure it, or take it out of the table")
    return found


def average(rows: Sequence[Row], length: int, arm: str, budget: float) -> Row | None:
    """Over RULER's tasks; None where it was not measured."""
    return selected(rows, suite="ruler", task="average", length=length, arm=arm, budget=budget)


def selected(rows: Sequence[Row], **where: Any) -> Row | None:
    where = {"model": MODEL, **where}
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
