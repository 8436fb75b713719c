"""The README's picture is of one run, and of all that it names."""

from __future__ import annotations

import pathlib
from typing import Any

import figures
import headline_picture
import pytest


def rows() -> list[dict[str, Any]]:
    return [dict(row) for row in figures.rows_of("serving.json")]


def test_every_place_has_every_system() -> None:
    found = headline_picture.shown(rows())
    together = [row for row in found if row["workload"] != "tpot"]
    assert len(together) == 3 * len(headline_picture.SYSTEMS)
    alone = {(row["model"], row["system"], row["context"]) for row in found if row["workload"] == "tpot"}
    assert len(alone) == len(found) - len(together) >= 2 * 3 * 3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"system": "lsa-separate"}, r"2 rows in serving\.json"),
        ({"commit": "0000000"}, "of the commits 0000000, "),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], problem: str) -> None:
    every = rows()
    (row,) = [r for r in every if r["workload"] == "iso" and r["model"] == "1b" and r["system"] == "lsa"]
    row |= change
    with pytest.raises(ValueError, match=problem):
        headline_picture.shown(every)


def test_stock_is_what_the_legend_says() -> None:
    every = rows()
    for row in every:
        if row["system"] == "stock":
            row["decode_backend"] = "triton"
    with pytest.raises(ValueError, match="calls stock FlashAttention-3, and rows are of triton"):
        headline_picture.shown(every)


def test_a_second_row_of_a_place_is_refused() -> None:
    every = rows()
    every += [row for row in every if row["workload"] == "iso" and row["model"] == "1b"]
    with pytest.raises(ValueError, match=r"6 rows in serving\.json"):
        headline_picture.shown(every)


def test_it_is_drawn(tmp_path: pathlib.Path) -> None:
    headline_picture.draw(tmp_path / "p.png", headline_picture.shown(rows()))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
