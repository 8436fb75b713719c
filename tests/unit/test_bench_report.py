"""Results of ``bench serving``: files, ratios, table."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from itertools import pairwise
from typing import Any

import pytest
from bench_rows import LSA, STOCK, row
from rich.console import Console

from sglang_lsa.bench import report
from sglang_lsa.bench.report import SERVING

FLASHINFER = row("stock-flashinfer", decode_tokens_per_s=160.0, tpot_ms_p50=24.0)
OVER_STOCK = {"gain": 3.25, "gain_to": "stock", "gain_to_stock": 3.25}


def test_there_are_no_results_before_the_first_run(tmp_path: pathlib.Path) -> None:
    assert SERVING.read(tmp_path) == []


def test_a_later_row_replaces_an_earlier_one(tmp_path: pathlib.Path) -> None:
    SERVING.write(tmp_path, [STOCK, LSA, row("lsa", "random")])
    SERVING.write(tmp_path, [row("stock", decode_tokens_per_s=210.0), row("stock", batch=14)])
    rows = {(r["system"], r["policy"], r["batch"]): r["decode_tokens_per_s"] for r in SERVING.read(tmp_path)}
    assert rows == {
        ("stock", None, 13): 210.0,
        ("stock", None, 14): 200.0,
        ("lsa", "quest", 13): 650.0,
        ("lsa", "random", 13): 200.0,
    }
    assert len(SERVING.read(tmp_path)) == 4


def test_the_order_of_the_rows_does_not_depend_on_the_order_of_the_runs(tmp_path: pathlib.Path) -> None:
    rows = [STOCK, LSA, row("stock", workload="tpot", batch=1), row("stock", model="1b")]
    for folder, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / folder).mkdir()
        SERVING.write(tmp_path / folder, order)
    assert SERVING.read(tmp_path / "a") == SERVING.read(tmp_path / "b")


def test_results_are_written_as_csv_and_picture_too(tmp_path: pathlib.Path) -> None:
    single = [row(system, policy, workload="tpot", batch=1) for system, policy in (("stock", None), ("lsa", "quest"))]
    SERVING.write(tmp_path, [STOCK, LSA, *single])
    with (tmp_path / "serving.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {*STOCK, *LSA, *OVER_STOCK}
    assert [r["system"] for r in rows] == ["lsa", "stock", "lsa", "stock"]
    assert [r["recall_gbps"] for r in rows] == ["12.34", "", "", ""]
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads((tmp_path / "serving.json").read_text()) == SERVING.read(tmp_path)


@pytest.mark.parametrize("rows", [[], [STOCK], [LSA]], ids=["none", "stock", "lsa"])
def test_results_of_one_system_are_written(rows: list[dict[str, Any]], tmp_path: pathlib.Path) -> None:
    SERVING.write(tmp_path, rows)
    assert SERVING.read(tmp_path) == rows
    assert (tmp_path / "serving.png").exists()
    assert report.comparisons(rows) == []


def test_only_rows_of_the_same_arm_are_compared() -> None:
    others = [
        row("lsa", "quest", **other)
        for other in ({"context": 1024}, {"kv_dtype": "fp8_e4m3"}, {"gpu": "another card"}, {"server_args": "--x"})
    ]
    random = row("lsa", "random")
    found = report.comparisons([LSA, STOCK, *others, random])
    assert [(each.row, each.rivals) for each in found] == [(LSA, {"stock": STOCK}), (random, {"stock": STOCK})]


@pytest.mark.parametrize("workload", ["iso", "tpot"])
def test_lsa_is_compared_with_the_faster_stock_and_with_each(workload: str, tmp_path: pathlib.Path) -> None:
    rows = [each | {"workload": workload} for each in (FLASHINFER, LSA, STOCK)]
    SERVING.write(tmp_path, rows)
    (lsa,) = (each for each in SERVING.read(tmp_path) if each["system"] == "lsa")
    over = {"iso": (3.25, 650 / 160), "tpot": (1.25, 1.5)}[workload]
    assert (lsa["gain"], lsa["gain_to"]) == (over[0], "stock")
    assert (lsa["gain_to_stock"], lsa["gain_to_stock-flashinfer"]) == over
    SERVING.write(tmp_path, [rows[0] | {"decode_tokens_per_s": 325.0, "tpot_ms_p50": 10.0}])
    (lsa,) = (each for each in SERVING.read(tmp_path) if each["system"] == "lsa")
    assert (lsa["gain"], lsa["gain_to"]) == ({"iso": 2.0, "tpot": 0.625}[workload], "stock-flashinfer")
    assert lsa["gain_to_stock"] == over[0]


@pytest.mark.parametrize(("workload", "ratio"), [("tpot", 1.25), ("iso", 3.25), ("shared", 3.25)])
def test_gain_is_time_for_tpot_and_throughput_otherwise(workload: str, ratio: float) -> None:
    assert report.gain(STOCK | {"workload": workload}, LSA | {"workload": workload}) == ratio


def test_the_table_holds_all_systems_and_the_gain_over_each() -> None:
    text = io.StringIO()
    unmeasured = row("lsa", "random", kv_gpu_bytes=None)
    Console(file=text, width=240).print(report.table([LSA, STOCK, unmeasured, FLASHINFER]))
    assert "GPU of a test" in text.getvalue()
    stock, flashinfer, quest, more, random, _ = (
        line for line in text.getvalue().splitlines() if "13 x 60,000" in line or "x stock-" in line
    )
    for line, parts in (
        (stock, ("stock ", " fa3 ", "bfloat16", " 1 ", " 200 ", "20.00")),
        (flashinfer, ("stock-flashinfer", " flashinfer ", " 160 ", "24.00")),
        (quest, ("8b", "iso", "quest", "fa3/flashinfer", " 64 ", "650", "16.00", "3.25x stock", "32.0", "12.3")),
        (random, ("1.00x stock", " - ")),
        (more, ("4.06x stock-flashinfer",)),
    ):
        for part in parts:
            assert part in line


def test_bars_hide_no_other_and_have_colors_of_their_own() -> None:
    from matplotlib.figure import Figure

    systems, kinds = ("stock", "stock-flashinfer", "lsa"), ("bfloat16", "fp8_e4m3")
    rows = [row(name, tp=tp, kv_dtype=kind) for name in systems for tp in (1, 2) for kind in kinds]
    axis = Figure().subplots()
    report._draw_throughput(axis, [*rows, row("lsa", batch=99)])
    bars = sorted(axis.patches, key=lambda bar: bar.get_x())
    assert len(bars) == len(rows) + 1
    assert all(left.get_x() + left.get_width() <= right.get_x() + 1e-9 for left, right in pairwise(bars))
    assert len({bar.get_facecolor() for bar in bars}) == len(rows)
    names = [label.get_text().split("\n") for label in axis.get_xticklabels()]
    assert ["8b iso", "13 x 60K", "fp8_e4m3, TP 2"] in names


@pytest.mark.parametrize("number", [1, 20, 21, 40])
def test_as_many_colors_as_there_are_lines(number: int) -> None:
    """Rows of all runs into one folder are drawn: four kinds of KV and ranks of eight systems are more than twenty."""
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    report._draw_pace(axis, [row("lsa", workload="tpot", model=f"model-{index}") for index in range(number)])
    assert len({tuple(line.get_color()) for line in axis.lines}) == number
