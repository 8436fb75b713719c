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
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(model, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def plot_depth(path: pathlib.Path, rows: Sequence[dict[str, Any]], model: str) -> bool:
    """Accuracy of samples with one place to find, by its depth and the length, a panel an arm. False: there is none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    placed = [r for r in rows if r["depth"] is not None and r["score"] is not None and r["model"] == model]
    labels, lengths = list(dict.fromkeys(r["label"] for r in placed)), sorted({r["length"] for r in placed})
    if not placed:
        return False
    figure, axes = plt.subplots(
        1, len(labels), figsize=(2.2 * len(labels) + 1, 3), sharey=True, squeeze=False, layout="constrained"
    )
    image = None
    for axis, label in zip(axes[0], labels, strict=True):
        grid = np.full((DEPTHS, len(lengths)), np.nan)
        for band in range(DEPTHS):
            for column, length in enumerate(lengths):
                own = [
                    r["score"]
                    for r in placed
                    if r["label"] == label
                    and r["length"] == length
                    and min(int(r["depth"] * DEPTHS), DEPTHS - 1) == band
                ]
                if own:
                    grid[band, column] = 100 * np.mean(own)
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axis.set_title(label, fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{length // 1024}K" for length in lengths], fontsize=8)
        axis.set_yticks(range(DEPTHS), [f"{100 * band // DEPTHS}%" for band in range(DEPTHS)], fontsize=8)
    axes[0][0].set_ylabel("depth of the answer")
    if image is not None:
        figure.colorbar(image, ax=axes[0].tolist(), label="accuracy")
    figure.suptitle(model, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
