"""``bench load`` with a real server: a tiny shape, a pool smaller than the memories, a handful of requests."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from rich.console import Console

from sglang_lsa.bench import load
from sglang_lsa.bench.load_client import Load
from sglang_lsa.bench.load_figures import Objective, figures

pytestmark = pytest.mark.server
SECONDS, RATE = 5.0, 2.0
GENEROUS, IMPOSSIBLE = Objective(30.0, 5000.0), Objective(1e-6, 1e-6)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[Load], pathlib.Path]:
    """Rows of both mixes, the runs they are from, and the folder of results."""
    output = tmp_path_factory.mktemp("load")
    loads: list[Load] = []

    def remembered(run: Load, objective: Objective) -> dict[str, Any]:
        loads.append(run)
        return figures(run, objective)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "figures", remembered)
        rows = load.run(
            output,
            Console(quiet=True),
            models=["tiny"],
            mixes=["agents", "documents"],
            systems=["lsa"],
            rates=[RATE],
            times=[],
            seconds=SECONDS,
            pool_gb=0.003,
            memories=3,
            max_running=4,
            objective=GENEROUS,
            kv_dtype="auto",
            resume=False,
            server_args="--lsa-min-context 512 --lsa-debug",
            command="the test",
        )
    return rows, loads, output


def test_every_request_is_answered_and_counted(measured: Any) -> None:
    rows, loads, _ = measured
    assert [row["mix"] for row in rows] == ["agents", "documents"]
    for row, run in zip(rows, loads, strict=True):
        assert 3 <= row["requests"] == len(run.sent) == row["completed"] == row["met_objective"]
        assert row["unfinished"] == row["refused"] == row["late"] == row["no_first_token"] == 0
        assert row["goodput_per_s"] == row["requests"] / SECONDS >= row["completed_per_s"] > 0
        assert [one.stream.count for one in run.sent] == [one.request.answer for one in run.sent]
        assert row["output_tokens_per_s"] <= sum(one.request.answer for one in run.sent) / SECONDS
        assert 0 < row["ttft_s_p50"] <= row["ttft_s_p99"] < 30
        assert 0 < row["itl_ms_p50"] <= row["itl_ms_p99"]
        assert row["running_mean"] <= row["running_max"] <= 4 and row["retractions"] == 0


def test_agents_find_their_memories_though_the_device_does_not_hold_them(measured: Any) -> None:
    agents, documents = measured[0]
    assert agents["memories"] == 3 and agents["kv_pool_bytes"] < 3500 * 1024
    assert agents["cached_fraction"] > 0.9 and agents["recalled_bytes"] + agents["streamed_bytes"] > 0
    assert documents["cached_fraction"] == 0 and documents["memories"] == 0


def test_the_objective_counts(measured: Any) -> None:
    for run in measured[1]:
        found = figures(run, IMPOSSIBLE)
        assert (found["met_objective"], found["late"], found["goodput_per_s"]) == (0, len(run.sent), 0.0)


def test_rows_say_where_they_are_from(measured: Any) -> None:
    rows, _, output = measured
    assert json.loads((output / "load.json").read_text()) == rows
    assert (output / "load.png").exists() and (output / "load.csv").exists()
    for row in rows:
        assert (row["command"], row["decode_backend"], row["page_size"]) == ("the test", "torch_native", 64)
        assert "CPU cores" in row["gpu"] and row["rate_per_s"] == RATE
