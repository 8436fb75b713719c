"""Pictures of an evaluation: accuracy and divergence against memory, and accuracy by depth and length."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_lsa.evaluation.arms import ARMS, FULL, LSA
from sglang_lsa.evaluation.summary import ALL, AVERAGE

DEPTHS = 5
"""Rows of the heat map."""
NAMES = {
    FULL: "full attention",
    LSA: "trained indexer",
    "lsa_calibrated": "calibrated",
    "quest": "Quest",
    "recency": "last pages",
}
"""Arms as people read them; others by their own name, variants of one of these by both names."""
STEPS = (1.0, 2.0, 5.0)
"""Round numbers of every power of ten."""
COLUMNS = 4
"""Most panels side by side in the picture of the divergence."""


def draw(output: pathlib.Path, found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], model: str) -> None:
    """Every picture that there is something for, as ``quality-``, ``kl-`` and ``depth-MODEL.png``.

    Args:
        found: of ``summarise``.
        rows: of ``run.Evaluation``.
    """
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", model)
    plot_footprint(output / f"quality-{name}.png", found, model)
    plot_kl(output / f"kl-{name}.png", found, model)
    plot_depth(output / f"depth-{name}.png", rows, model)


def plot_footprint(path: pathlib.Path, found: Sequence[dict[str, Any]], model: str, suite: str = ALL) -> bool:
    """Averages over all suites, or over one, against the share of the KV's memory, one panel a length. False: there are
    none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in found if r["task"] == AVERAGE and r["suite"] == suite and r["model"] == model]
    lengths = sorted({row["length"] for row in rows})
    if not lengths:
        return False
    color_of = colors(found, model)
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(3.2 * len(lengths) + 1, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, length in zip(axes[0], lengths, strict=True):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            own = sorted(
                (r for r in rows if r["arm"] == arm and r["length"] == length), key=lambda r: r["footprint"] or 1.0
            )
            x, y = [100 * (r["footprint"] or 1.0) for r in own], [r["accuracy"] for r in own]
            if arm == FULL:
                axis.axhline(y[0], color="black", linewidth=1, linestyle="--", label=FULL)
            else:
                axis.plot(x, y, marker="o", label=arm, color=color_of[arm])
        axis.set_title(f"{length:,} tokens")
        axis.set_xlabel("device memory, % of all KV")
    axes[0][0].set_ylabel("accuracy")
    axes[0][-1].legend(fontsize=8, loc="center right")
    figure.suptitle(model if suite == ALL else f"{model}, {suite}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


@dataclass(frozen=True)
class Panel:
    """One panel of the picture of the divergence.

    Attributes:
        title: what it is an average over, and the length.
        full: full attention's own divergence, which rounding makes; None where it is unknown.
        arms: of each arm, by bytes, ``(percent of all KV bytes, mean KL, its interval's ends)``.
    """

    title: str
    full: float | None
    arms: dict[str, list[tuple[float, float, float, float]]]


def plot_kl(path: pathlib.Path, found: Sequence[dict[str, Any]], model: str) -> bool:
    """Divergence from full attention against the share of the KV's bytes, see :func:`kl_panels`. Both axes are
    logarithmic; what is 0 is a triangle on the lower edge. False: no arm has any, and there is no picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels, color_of = kl_panels(found, model), colors(found, model)
    if not panels:
        return False
    columns = min(COLUMNS, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(3.2 * columns + 2, 3.4 * -(-len(panels) // columns)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    points = [point for panel in panels for own in panel.arms.values() for point in own]
    _logarithmic(axes[0][0], "x", (point[0] for point in points))
    _logarithmic(axes[0][0], "y", (value for point in points for value in point[1:]))
    lines: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for arm in (arm for arm in color_of if arm in panel.arms):
            x, y, low, high = np.array(panel.arms[arm]).T
            ends, color = np.maximum([y - low, high - y], 0), color_of[arm]
            lines[arm] = axis.errorbar(
                x, np.where(y > 0, y, np.nan), ends, marker="o", markersize=5, capsize=3, color=color
            )
            same, edge = x[y <= 0], axis.get_xaxis_transform()
            axis.plot(same, 0 * same, "v", color=color, transform=edge, clip_on=False, in_layout=False)
        title = panel.title
        if panel.full is not None:
            own = np.format_float_positional(panel.full, precision=1, fractional=False, trim="-")
            title += f"\nfull attention itself: {own}"
        axis.set_title(title, fontsize=9)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("device memory, % of all KV")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("KL from full attention, nats a token")
    shown = [arm for arm in color_of if arm in lines]
    figure.legend(
        [lines[arm] for arm in shown], [arm_name(arm) for arm in shown], fontsize=8, loc="outside right upper"
    )
    figure.suptitle(model, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def kl_panels(found: Sequence[dict[str, Any]], model: str) -> list[Panel]:
    """Averages over all suites, one panel a length; then tasks that are in none: those without right answers, and of
    lengths at which no task counts, all.

    Args:
        found: of ``summarise``, whose divergences these are. Rows without one are left out.
    """
    rows = [r for r in found if r["model"] == model and r.get("kl") is not None and r["footprint"] is not None]
    averages = [row for row in rows if row["task"] == AVERAGE and row["suite"] == "all"]
    lengths = {row["length"] for row in averages}
    tasks = [r for r in rows if r["task"] != AVERAGE and (r["accuracy"] is None or r["length"] not in lengths)]
    members: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in averages:
        members.setdefault(("average of tasks", row["length"]), []).append(row)
    for row in tasks:
        members.setdefault((f"{row['suite']} {row['task']}", row["length"]), []).append(row)
    panels = []
    for (name, length), own in sorted(members.items(), key=lambda item: (item[1][0]["task"] != AVERAGE, item[0])):
        arms: dict[str, list[tuple[float, float, float, float]]] = {}
        for row in sorted(own, key=lambda row: row["footprint"]):
            if row["arm"] != FULL:
                point = (100 * row["footprint"], row["kl"], row["kl_ci_low"], row["kl_ci_high"])
                arms.setdefault(row["arm"], []).append(point)
        if arms:
            full = next((row["kl"] for row in own if row["arm"] == FULL), None)
            panels.append(Panel(f"{name}, {length:,} tokens", full, arms))
    return panels


def colors(found: Sequence[dict[str, Any]], model: str) -> dict[str, str]:
    """Of every arm but full attention, the same in every picture: in the order of averages, then of tasks."""
    rows = [row for row in found if row["model"] == model and row["arm"] != FULL]
    averages = [row for row in rows if row["task"] == AVERAGE and row["suite"] == "all"]
    return {arm: f"C{number}" for number, arm in enumerate(dict.fromkeys(row["arm"] for row in [*averages, *rows]))}


def arm_name(arm: str) -> str:
    """As people read it: ``trained indexer, auto`` for ``lsa_auto``."""
    first, *variant = arm.split("_")
    if arm in NAMES or first not in ARMS:  # names of endpoints are theirs
        return NAMES.get(arm, arm)
    return ", ".join([NAMES.get(first, first), *variant])


def _logarithmic(axes: Any, which: str, values: Iterable[float]) -> None:
    """The axis ``x`` or ``y`` from one round number to another, with ticks that say what they are; 0 lies outside."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    known = [value for value in values if value > 0] or [1.0]
    low = max(number for number in _round_numbers(min(known)) if number <= min(known))
    high = min(number for number in _round_numbers(max(known)) if number >= max(known))
    if low == high:
        low, high = low / 2, high * 2
    decades = math.log10(high / low)
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low / 1.1, high * 1.1)})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decades < 1.5 else STEPS if decades < 3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _round_numbers(near: float) -> list[float]:
    """Those of its power of ten and of the next."""
    power = math.floor(math.log10(near))
    return [float(f"{step}e{exponent}") for exponent in (power, power + 1) for step in STEPS]


def plot_depth(path: pathlib.Path, rows: Sequence[dict[str, Any]], model: str) -> bool:
    """Accuracy of samples with one place to find, by its depth and the length: a panel for every arm and budget.

    Returns:
        False: there are no such samples, and no picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    placed = [r for r in rows if r["depth"] is not None and r["score"] is not None and r["model"] == model]
    lengths = sorted({r["length"] for r in placed})
    if not placed:
        return False
    arms = [FULL, *dict.fromkeys(r["arm"] for r in placed if r["arm"] != FULL)]
    budgets = sorted({r["budget"] for r in placed if r["arm"] != FULL}, reverse=True) or [1.0]
    figure, axes = plt.subplots(
        len(budgets),
        len(arms),
        figsize=(1.7 * len(arms) + 1.5, 2.1 * len(budgets) + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    image = None
    for budget, row in zip(budgets, axes, strict=True):
        for arm, axis in zip(arms, row, strict=True):
            own = [r for r in placed if r["arm"] == arm and (arm == FULL or r["budget"] == budget)]
            grid = accuracy_by_depth(own, lengths)
            image = axis.imshow(100 * grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            axis.set_title(arm if arm == FULL else f"{arm} {budget:.1%}", fontsize=9)
            axis.set_xticks(range(len(lengths)), [f"{length / 1024:.0f}K" for length in lengths], fontsize=8)
            axis.set_yticks(range(DEPTHS), [f"{100 * band // DEPTHS}%" for band in range(DEPTHS)], fontsize=8)
        row[0].set_ylabel("depth of the answer", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes.ravel().tolist(), label="accuracy")
    figure.suptitle(model, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def accuracy_by_depth(rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> np.ndarray:
    """Mean scores, ``[DEPTHS, lengths]``; NaN where nothing was asked."""
    grid = np.full((DEPTHS, len(lengths)), np.nan)
    for band in range(DEPTHS):
        for column, length in enumerate(lengths):
            own = [
                row["score"]
                for row in rows
                if row["length"] == length and min(int(row["depth"] * DEPTHS), DEPTHS - 1) == band
            ]
            if own:
                grid[band, column] = np.mean(own)
    return grid
