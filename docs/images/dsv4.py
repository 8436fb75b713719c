"""Draws dsv4.png: where a page of DeepSeek-V4 lies, and what decode reads. Run: python docs/images/dsv4.py"""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import patches, pyplot

from sglang_lsa.bench.dsv4_shapes import DSV4_SHAPES

PAGED, KEPT, STOCK, HOST = "#4c78a8", "#f2a541", "#b8b8b8", "#8fbf8f"
SHAPE = DSV4_SHAPES["rank"]
RESIDENT, CONTEXT, TAIL = (0, 5, 9), 15, 13
"""Of the request that is drawn: chosen pages, all of its pages, and the first page of its tail."""
PHYSICAL = {0: 4, 5: 1, 9: 6, 13: 2, 14: 7}


def box(axis: Any, x: float, y: float, width: float, height: float, color: str, text: str = "", size: int = 8) -> None:
    axis.add_patch(patches.Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def where(axis: Any) -> None:
    axis.set_title("What 256 tokens leave behind (DeepSeek-V4-Flash), and where it lies", fontsize=10, loc="left")
    axis.text(0, 3.85, "GPU, device pool: chosen pages", fontsize=8, weight="bold")
    entries = SHAPE.c4_layers * 37_440
    box(axis, 0, 2.7, 5.4, 1, PAGED, f"entries for 4 tokens\n{SHAPE.c4_layers} layers, {entries:,} bytes")
    box(axis, 5.4, 2.7, 1.8, 1, PAGED, f"their index keys\n{SHAPE.page_bytes - entries:,}")
    axis.annotate("", (3.6, 1.35), (3.6, 2.65), arrowprops={"arrowstyle": "<->", "color": "#444444"})
    axis.text(3.75, 1.95, "stored when complete, recalled when chosen", fontsize=7, va="center")
    axis.text(0, -0.25, "host memory: a mirror of every complete page", fontsize=8, weight="bold", va="top")
    box(axis, 0, 0.1, 7.2, 1.2, HOST, f"the same bytes, {SHAPE.page_bytes:,} a page")
    axis.text(8, 3.85, "GPU, for every page of the mirror", fontsize=8, weight="bold")
    box(axis, 8, 2.7, 2.4, 1, KEPT, f"entries for 128 tokens\n{SHAPE.c128_layers} layers, {SHAPE.rest_bytes:,}")
    box(axis, 10.4, 2.7, 2.4, 1, KEPT, f"index keys of the 3 layers\nthat choose, {SHAPE.scored_bytes:,}")
    box(axis, 12.8, 2.7, 1.2, 1, KEPT, "window map\n2,048", 7)
    axis.text(8, -0.25, "GPU, as large as without LSA", fontsize=8, weight="bold", va="top")
    box(axis, 8, 0.1, 3, 1.2, STOCK, "sliding window\nall 43 layers, last 128 tokens")
    box(axis, 11, 0.1, 3, 1.2, STOCK, "compression states\nof windows and requests")
    axis.set(xlim=(-0.2, 14.2), ylim=(-0.7, 4.4))


def reads(axis: Any) -> None:
    axis.set_title("What a decode step is given: no mask, a shorter table", fontsize=10, loc="left")
    axis.text(-0.15, 2.45, "pages of\na request", fontsize=7, ha="right", va="center")
    for page in range(CONTEXT):
        color = PAGED if page in PHYSICAL else "#e6e6e6"
        box(axis, page * 0.93, 2.1, 0.88, 0.7, color, str(page))
    axis.text(TAIL * 0.93, 2.95, "tail: always read", fontsize=7)
    axis.text(-0.15, 0.45, "its table\n(physical)", fontsize=7, ha="right", va="center")
    for column, (page, physical) in enumerate(PHYSICAL.items()):
        box(axis, column * 0.93 + 3.7, 0.1, 0.88, 0.7, PAGED, str(physical))
        to = (column * 0.93 + 4.14, 0.85)
        axis.annotate("", to, (page * 0.93 + 0.44, 2.05), arrowprops={"arrowstyle": "->", "color": "#444444"})
    box(axis, 5 * 0.93 + 3.7, 0.1, 0.88, 0.7, "#e6e6e6", "0")
    text = "the index scores 64 entries a page of these,\nand attention reads what it selects"
    axis.text(9.6, 0.45, text, fontsize=8, va="center")
    axis.set(xlim=(-0.9, 14.2), ylim=(-0.1, 3.4))


def main() -> None:
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 6.2), height_ratios=(1.35, 1))
    where(axes[0])
    reads(axes[1])
    for axis in axes:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(pathlib.Path(__file__).with_name("dsv4.png"), dpi=110)


if __name__ == "__main__":
    main()
