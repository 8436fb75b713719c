"""The README's picture: one H200, one request over its context, and many requests in one KV pool. See figures.py."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
SYSTEMS = {"stock": "stock (FlashAttention-3)", "stock-flashinfer": "stock with FlashInfer", "lsa": "LSA"}
COLORS = {"stock": "#9a9a9a", "stock-flashinfer": "#c9c9c9", "lsa": "#1f77b4"}
ALONE = {"8b": "8B", "1b": "1B"}
TOGETHER = (
    ({"model": "1b", "workload": "iso", "batch": 26, "context": 60000}, "26 contexts of 60K sent,\npool of 8 GB (1B)"),
    ({"model": "8b", "workload": "shared", "batch": 8, "context": 132096}, "8 agents over one\n128K memory (8B)"),
    ({"model": "8b", "workload": "shared", "batch": 32, "context": 132096}, "32 agents over one\n128K memory (8B)"),
)
"""What tells rows apart, and how the place is called."""


def shown(rows: Sequence[Row]) -> list[Row]:
    """Rows of ``serving.json`` that the picture is of: one GPU, KV in bfloat16, the same commit for all systems.

    Raises:
        ValueError: of some system a place has no row, or several; or what the picture says of all rows is not so.
    """
    here = [row for row in rows if row["tp"] == 1 and row["kv_dtype"] == "bfloat16" and row["system"] in SYSTEMS]
    found = [row for row in here if row["workload"] == "tpot" and row["batch"] == 1 and row["model"] in ALONE]
    for place, name in TOGETHER:
        own = [row for row in here if all(row[key] == value for key, value in place.items())]
        if sorted(row["system"] for row in own) != sorted(SYSTEMS):
            raise ValueError(
                f"the README's picture, {name!r}: {len(own)} rows in serving.json, one of each system wanted"
            )
        found += own
    if len(commits := {row["commit"] for row in found}) > 1:
        raise ValueError(f"the README's picture is of the commits {', '.join(sorted(commits))}: of one, it must be")
    stock = [row for row in found if row["system"] == "stock"]
    if other := {row["decode_backend"] for row in stock} - {"fa3"}:
        raise ValueError(f"the README's picture calls stock FlashAttention-3, and rows are of {', '.join(other)}")
    return found


def draw(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """
    Args:
        rows: as :func:`shown` gives them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1.25))
    for model, style in (("8b", "-"), ("1b", "--")):
        for system in SYSTEMS:
            own = sorted(
                (row["context"], row["tpot_ms_p50"])
                for row in rows
                if row["workload"] == "tpot" and row["model"] == model and row["system"] == system
            )
            contexts, times = zip(*own, strict=True)
            left.plot(contexts, times, style, color=COLORS[system], marker="o", markersize=4)
            if system == "stock":
                left.annotate(ALONE[model], (contexts[-1], times[-1]), (6, -4), textcoords="offset points")
    left.set_xscale("log", base=2)
    ticks = {1024: "1K", 8192: "8K", 32768: "32K", 131072: "128K", 256000: "256K"}
    left.set_xticks(list(ticks), ticks.values())
    left.margins(x=0.1)
    left.set_ylim(bottom=0)
    left.set_xlabel("context of one request, tokens")
    left.set_title("milliseconds per token")
    for place, (key, _) in enumerate(TOGETHER):
        own = {row["system"]: row for row in rows if all(row[name] == value for name, value in key.items())}
        for offset, system in enumerate(SYSTEMS):
            row = own[system]
            label = f"{row['decode_tokens_per_s']:,.0f}"
            if row["running_requests"] < row["batch"]:
                label += f"\n{row['running_requests']} run"
            bar = right.bar(place + 0.27 * (offset - 1), row["decode_tokens_per_s"], 0.25, color=COLORS[system])
            right.bar_label(bar, [label], fontsize=8, padding=2)
    right.set_xticks(range(len(TOGETHER)), [name for _, name in TOGETHER])
    right.margins(y=0.14)
    right.set_title("tokens per second, the same KV pool")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[system]) for system in SYSTEMS]
    figure.legend(handles, SYSTEMS.values(), loc="lower center", ncols=len(SYSTEMS), frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
