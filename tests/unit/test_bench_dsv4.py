"""``bench dsv4`` without a GPU: what a server is asked, and what becomes of it."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from bench_dsv4 import RANK, asked_of
from rich.console import Console

from sglang_lsa.bench import dsv4, dsv4_arms, dsv4_measure, dsv4_plugin
from sglang_lsa.bench.dsv4_arms import DSV4_ARMS, DSV4_SYSTEMS, Plan
from sglang_lsa.bench.dsv4_report import DSV4, comparisons, table
from sglang_lsa.bench.parser import add_parser
from sglang_lsa.server_process import ServerFailed
from sglang_lsa.streaming import Stream

# --- rows -------------------------------------------------------------------------------------------------------------


class FakeServer:
    """Answers what a benchmark asks of a server with LSA."""

    url = "http://nowhere"

    def __init__(self) -> None:
        self.process = SimpleNamespace(poll=lambda: None)
        self.statuses = iter((status(0, 0, 0), status(300, 4, 400)))
        self.posted: list[str] = []

    def get(self, path: str) -> Any:
        assert path == "/lsa/status"
        return next(self.statuses)

    def post(self, path: str, body: Any, **options: Any) -> None:
        self.posted.append(path)


def status(prefetched: int, samples: int, held: int) -> dict[str, Any]:
    return {
        "page_bytes": 1000,
        "physical": {"overhead_bytes": {"page_keys": 50, "tables": 7, "c128_kv": 4000}},
        "recalls": {"prefetched_pages": prefetched, "late_pages": prefetched // 100},
        "host": {"mirror_bytes": 9000},
        "pressure": {"retractions": 0},
        "decoding": {"2": {"samples": samples, "held_pages": samples * held}},
        "stalls": 0,
        "graphless_steps": 0,
    }


def streams(cached: int, requests: int) -> list[Stream]:
    times = [float(time) for time in range(1, 66)]
    found = [Stream(0.5, list(times), list(range(1, 66)), done=True) for _ in range(requests)]
    for stream in found:
        stream.usage = {"cached_tokens": cached}
    return found


@pytest.fixture
def measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> dsv4_measure.Measurement:
    answers = {"forged": 2, "pools": {"c4_kv": 100, "c128_kv": 30}}
    monkeypatch.setattr(dsv4_plugin, "ask", lambda folder, what, alive: answers if "most" in what else what)
    made = Plan(3, 3, 0.01, 20.0)
    server: Any = FakeServer()
    return dsv4_measure.Measurement(server, tmp_path, asked_of(), DSV4_ARMS["256k"], DSV4_SYSTEMS["lsa"], made)


def sending(monkeypatch: pytest.MonkeyPatch, cached: int) -> list[int]:
    sent: list[int] = []

    async def together(url: str, prompts: Any, tokens: int) -> list[Stream]:
        sent.append(len(prompts))
        return streams(cached, len(prompts))

    monkeypatch.setattr(dsv4_measure, "run_together", together)
    return sent


def test_a_row_says_what_ran_what_it_weighed_and_what_was_recalled(
    measurement: dsv4_measure.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = sending(monkeypatch, DSV4_ARMS["256k"].context)
    measurement.warm_up()
    assert measurement.forge()["forged"] == 2
    row = measurement.row(DSV4_ARMS["256k"], 0.1)
    assert sent == [1, 2], "what was forged, not what was planned"
    assert (row["running_requests"], row["distinct_prefixes"], row["requests"]) == (2, 2, 2)
    assert row["decode_tokens_per_s"] == pytest.approx(2)
    assert row["tpot_ms_p50"] == row["tpot_ms_p99"] == 1000
    assert row["recall_bytes_per_s"] == pytest.approx(300 * 1000 / 64)
    assert row["host_bytes"] == 9000
    assert row["kv_bytes"] == 100 + 30 + 57, "pools, and what LSA has beside; c128 is a pool"
    assert row["gpu_share"] == pytest.approx(RANK.share(400 / 2048))
    assert row["gpu_share_nominal"] == pytest.approx(RANK.nominal_share(400 / 2048))
    assert set(DSV4.key) - {"gpu"} <= set(row)


def test_requests_that_missed_their_prefix_are_no_measurement(
    measurement: dsv4_measure.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending(monkeypatch, 0)
    measurement.forge()
    with pytest.raises(RuntimeError, match="2 of 2 requests found 0 tokens of their prefix, not 262144"):
        measurement.row(DSV4_ARMS["256k"], 0.0)


# --- runs and results -------------------------------------------------------------------------------------------------


class Bench:
    """``run`` with servers that take no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: pathlib.Path):
        self.output, self.seen, self.broken = output, [], ""
        self.seen: list[tuple[str, str, list[float | None]]]
        self.servers: list[str] = []
        monkeypatch.setattr(dsv4, "gpu_name", lambda: "GPU of a test")
        monkeypatch.setattr(dsv4, "measure", self.measure)
        monkeypatch.setattr(dsv4, "DSV4", dataclasses.replace(DSV4, draw=lambda *_: None))

    def measure(self, asked: dsv4_measure.Asked, system: Any, arm: Any, rows: Any, *_: Any) -> Iterator[dict[str, Any]]:
        self.servers.append(arm.name)
        names = "+".join(dict.fromkeys(arm.name for arm, _ in rows))
        self.seen.append((names, system.name, [churn for _, churn in rows]))
        if self.broken == system.name:
            raise ServerFailed("no V4 here")
        for arm, churn in rows:
            yield dsv4_measure.labels(asked, arm, system, churn) | figures(30.0 if system.lsa else 10.0)

    def run(self, **other: Any) -> list[tuple[str, str, list[float | None]]]:
        chosen: dict[str, Any] = {"models": ["rank"], "weights": "bfloat16", "arms": ["1m"], "kv_gb": 45.0, "share": 1}
        chosen |= {"systems": list(DSV4_SYSTEMS), "tokens": 64, "budget": 0.1, "churns": [0, 10], "resume": False}
        self.seen = []
        dsv4.run(self.output, Console(quiet=True), command="", **({"server_args": ""} | chosen | other))
        return self.seen


def figures(tokens_per_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {"decode_tokens_per_s": tokens_per_s, "running_requests": 3, "distinct_prefixes": 3}
    found |= dict.fromkeys(("tpot_ms_p50", "tpot_ms_p99", "recall_bytes_per_s"), 1.0)
    return found | {"kv_bytes": 10**9, "host_bytes": 0, "gpu_share": 0.19, "gpu_share_nominal": None}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


def test_every_system_of_an_arm_is_measured_and_lsa_with_every_churn(bench: Bench) -> None:
    everything = [("1m", "stock", [None]), ("1m", "stock-tuned", [None]), ("1m", "lsa", [0.0, 0.1])]
    assert bench.run() == everything
    assert bench.run(resume=True) == []
    assert bench.run(resume=True, churns=[0, 30]) == [("1m", "lsa", [0.3])]
    assert bench.run(resume=True, kv_gb=30.0, systems=["stock"]) == [("1m", "stock", [None])]
    assert [row["gain"] for row in DSV4.read(bench.output) if row["system"] == "lsa"] == [3, 3, 3]


def test_rows_of_servers_with_other_arguments_are_other_rows(bench: Bench) -> None:
    asked = {"resume": True, "systems": ["stock-tuned", "lsa"], "churns": [10]}
    seen = bench.run(**asked)
    assert bench.run(**asked, server_args="--log-level info") == seen
    assert bench.run(**asked, server_args="--log-level  info") == bench.run(**asked) == []
    bench.run(**asked | {"systems": ["stock"]}, server_args="--log-level info")
    compared = {row["server_args"]: row for row in DSV4.read(bench.output) if row["system"] == "lsa"}
    assert "gain_to_stock" not in compared[""] and "gain_to_stock" in compared["--log-level info"]
    with pytest.raises(ValueError, match="--server-args --x 'y: cannot be split"):
        bench.run(server_args="--x 'y")


def test_logs_of_other_runs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """By names that tell arms, churns and arguments apart."""
    logs: list[pathlib.Path] = []

    def begin(module: str, flags: Any, log: pathlib.Path, environment: Any) -> Any:
        logs.append(log)
        raise ServerFailed("no server here")

    monkeypatch.setattr(dsv4_measure, "ServerProcess", begin)
    monkeypatch.setattr(dsv4_arms, "available_host_memory", lambda: 1 << 50)
    arm, lsa = DSV4_ARMS["256k"], DSV4_SYSTEMS["lsa"]
    asked = asked_of()
    others = [
        asked,
        *(dataclasses.replace(asked, **one) for one in ({"tokens": 32}, {"server_args": "--log-level info"})),
    ]
    for one, churns in [*((one, (0.0,)) for one in others), (asked, (0.0, 0.1)), (asked, (0.0,))]:
        with pytest.raises(ServerFailed):
            list(dsv4_measure.measure(one, lsa, arm, [(arm, churn) for churn in churns], tmp_path, Console(quiet=True)))
    assert len(set(logs)) == 4 and logs[0] == logs[-1]


def test_arms_of_one_context_share_a_server_that_is_made_for_the_most_requests(bench: Bench) -> None:
    seen = bench.run(arms=["1x1m", "256k", "1m"], systems=["stock-tuned", "lsa"], churns=[10])
    assert seen == [
        ("1m+1x1m", "stock-tuned", [None, None]),
        ("1m+1x1m", "lsa", [0.1, 0.1]),
        ("256k", "stock-tuned", [None]),
        ("256k", "lsa", [0.1]),
    ]
    assert bench.run(arms=["1x1m"], systems=["lsa"], churns=[30], resume=True) == [("1x1m", "lsa", [0.3])]
    assert bench.run(arms=["1m", "1x1m"], systems=["lsa"], churns=[30], resume=True) == [("1m", "lsa", [0.3])]
    assert bench.servers == ["1m", "1m", "256k", "256k", "1x1m", "1m"]


def test_one_request_is_measured_over_prefixes_that_fill_the_kv(
    measurement: dsv4_measure.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = dataclasses.replace(DSV4_ARMS["256k"], name="1x256k", requests=1)
    sent = sending(monkeypatch, alone.context)
    measurement.forge()
    row = measurement.row(alone, 0.1)
    assert sent == [1, 1]
    assert (row["arm"], row["requests"], row["distinct_prefixes"], row["running_requests"]) == ("1x256k", 1, 1, 1)


def test_a_system_that_fails_leaves_the_others(bench: Bench) -> None:
    bench.broken = "stock"
    with pytest.raises(RuntimeError, match="stock rank 1m: no V4 here"):
        bench.run()
    assert len(DSV4.read(bench.output)) == 3
    bench.broken = ""
    assert bench.run(resume=True) == [("1m", "stock", [None])]


def rows(*systems: str, **other: Any) -> list[dict[str, Any]]:
    found = []
    for number, name in enumerate(systems):
        system = DSV4_SYSTEMS[name]
        label = dsv4_measure.labels(asked_of(**other), DSV4_ARMS["1m"], system, 0.1 if system.lsa else None)
        found.append(label | figures(10.0 * (number + 1)) | {"gpu": "a card"})
    return found


def test_lsa_is_compared_with_the_fastest_stock_that_has_the_same_bytes() -> None:
    (found,) = comparisons([*rows("stock", "stock-tuned", "lsa"), *rows("stock", kv_gb=30)])
    assert found.fastest == "stock-tuned"
    assert found.ratios == {"stock-tuned": 1.5, "stock": 3.0}


def test_results_are_written_as_csv_table_and_picture(tmp_path: pathlib.Path) -> None:
    DSV4.write(tmp_path, rows("stock", "stock-tuned", "lsa"))
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".csv", ".png"}
    console = Console(width=250, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(table(DSV4.read(tmp_path)))
    text = console.export_text()
    assert "1.50x stock-tuned" in text and "19.0%" in text and "10%" in text


def test_what_it_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(dsv4, "run", lambda output, console, **asked: seen.update(asked))
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", "dsv4", "--arms", "1m,256k", "--output", str(tmp_path), "--share", "3"])
    assert args.run(args) == 0
    assert (seen["arms"], seen["share"], seen["kv_gb"]) == (["1m", "256k"], 3, 45.0)
    assert (seen["systems"], seen["churns"]) == (["stock", "stock-tuned", "lsa"], [0, 10, 30])
    assert parser.parse_args(["bench", "dsv4", "--budget", "2"]).run(args) == 0
    assert args.run(parser.parse_args(["bench", "dsv4", "--budget", "2"])) == 1
