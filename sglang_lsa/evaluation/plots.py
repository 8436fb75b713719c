"""Pictures of an evaluation: accuracy against memory, and by depth and length."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_lsa.evaluation.arms import FULL
from sglang_lsa.evaluation.summary import AVERAGE

DEPTHS = 5
"""Rows of the heat map."""


def plot_footprint(path: pathlib.Path, found: Sequence[dict[str, Any]], model: str) -> bool:
    """Averages over all suites against the share of the KV's memory, one panel a length. False: there are none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in found if r["task"] == AVERAGE and r["suite"] == "all" and r["model"] == model]
    lengths = sorted({row["length"] for row in rows})
    if not lengths:
        return False
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
                axis.plot(x, y, marker="o", label=arm)
        axis.set_title(f"{length:,} tokens")
        axis.set_xlabel("device memory, % of all KV")
    axes[0][0].set_ylabel("accuracy")
    axes[0][-1].legend(fontsize=8, loc="center right")
    figure.suptitle(model, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


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
