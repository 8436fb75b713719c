"""Pictures of results, each with the digest of what it shows, and how they are drawn. See figures.py."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import headline_picture
import quality_larger_tables
from PIL import Image, PngImagePlugin

from sglang_lsa.bench.prefill_report import PREFILL
from sglang_lsa.bench.report import SERVING
from sglang_lsa.demo.picture import draw_results, panels
from sglang_lsa.evaluation.plots import kl_panels, plot_footprint, plot_kl
from sglang_lsa.evaluation.summary import ALL, AVERAGE

Row = dict[str, Any]
READ_AHEAD = ("lsa_ahead", "lsa_both")
"""Arms that pictures leave out: one point each, beside those of others."""
STAMP = "Data"
"""Key of a picture's text that has the digest of what it shows."""


@dataclass(frozen=True)
class Picture:
    """What a picture shows, and how it is drawn."""

    data: Any
    draw: Callable[[pathlib.Path], object]

    @property
    def stamp(self) -> str:
        data = json.dumps(self.data, sort_keys=True, default=lambda value: vars(value))
        return hashlib.sha256(data.encode()).hexdigest()


def of(docs: pathlib.Path, rows_of: Callable[[str], list[Row]], demo: Any) -> dict[pathlib.Path, Picture]:
    """All pictures, by their paths.

    Args:
        docs: the folder of the documentation.
        rows_of: rows of a result file.
        demo: the whole of the demonstration's.
    """
    results, found = docs / "results", {}
    for measured in (SERVING, PREFILL):
        rows = measured.with_ratios(measured.read(results))
        found[results / f"{measured.name}.png"] = Picture(rows, functools.partial(measured.draw, rows=rows))
    rows = headline_picture.shown(SERVING.read(results))
    found[results / "headline.png"] = Picture(rows, functools.partial(headline_picture.draw, rows=rows))
    quality = rows_of("quality.json") + rows_of("quality-1.5b.json")
    for model in dict.fromkeys(row["model"] for row in quality):
        averages = [row for row in quality if row["task"] == AVERAGE and row["model"] == model]
        suite = ALL if any(row["suite"] == ALL for row in averages) else "ruler"  # see docs/results/README.md
        shown = [row for row in averages if row["suite"] == suite and row["arm"] not in READ_AHEAD]
        draw = functools.partial(plot_footprint, found=shown, model=model, suite=suite)
        found[results / f"quality-{model.replace('/', '-')}.png"] = Picture(shown, draw)
    larger = rows_of("quality-1.5b.json") + rows_of("quality-1.5b-curve.json")
    model = quality_larger_tables.MODEL
    draw = functools.partial(plot_kl, found=larger, model=model)
    found[results / f"kl-{model.replace('/', '-')}.png"] = Picture(kl_panels(larger, model), draw)
    found[docs / "residency.png"] = Picture(panels(demo), functools.partial(draw_results, demo))
    return found


def stamp_of(path: pathlib.Path) -> str | None:
    """The digest of what a picture shows."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(STAMP)


def draw(path: pathlib.Path, picture: Picture) -> None:
    picture.draw(path)
    text = PngImagePlugin.PngInfo()
    text.add_text(STAMP, picture.stamp)
    with Image.open(path) as image:
        image.load()
        image.save(path, pnginfo=text, optimize=True)
