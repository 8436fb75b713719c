"""``bench load`` without servers: what is measured, rows, runs that are resumed, command line."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bench_traffic import AGENTS, DOCUMENTS, OBJECTIVE, RUN, sent
from rich.console import Console

from sglang_lsa import cli
from sglang_lsa.bench import load, load_report, servers, serving_arms
from sglang_lsa.bench.load_client import Load
from sglang_lsa.bench.load_figures import Objective, figures
from sglang_lsa.bench.load_mix import Mix
from sglang_lsa.bench.load_plan import SEARCHED, Plan
from sglang_lsa.bench.load_report import LOAD
from sglang_lsa.bench.serving_arms import Group
from sglang_lsa.bench.systems import SYSTEMS
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.server_process import STOCK, ServerFailed

# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with host memory for everything."""
    monkeypatch.setattr(serving_arms, "available_host_memory", lambda: 1 << 50)


def plan(**other: Any) -> Plan:
    asked: dict[str, Any] = {
        "group": Group("8b", 16.0, (), room=64),
        "mixes": (AGENTS, DOCUMENTS),
        "systems": (SYSTEMS["stock"], SYSTEMS["lsa"]),
        "rates": (1.0, 2.0),
        "times": (0.5, 1.0),
        "seconds": 60.0,
        "objective": OBJECTIVE,
        "gpu": "GPU of a test",
    }
    return Plan(**(asked | other))


@pytest.mark.usefixtures("roomy")
def test_all_systems_have_the_same_pool_and_say_every_token() -> None:
    for name, system in SYSTEMS.items():
        flags = plan().arguments(system, pathlib.Path("model"))
        value = dict(zip(flags, [*flags[1:], ""], strict=True))
        assert value["--lsa-device-tokens" if system.lsa else "--max-total-tokens"] == str(131_072), name
        assert value["--max-running-requests"] == value["--cuda-graph-max-bs-decode"] == "64"
        assert value["--stream-interval"] == "1"
        assert int(value["--context-length"]) >= AGENTS.longest
        assert ("--lsa-host-memory-gb" in flags) == system.lsa


@pytest.mark.usefixtures("roomy")
def test_the_mirror_holds_all_memories_and_what_runs() -> None:
    tokens = sum(AGENTS.memory_lengths)
    assert plan(mixes=(AGENTS,)).mirror_tokens() == tokens + 64 * (1000 + 800 + PAGE_SIZE)
    assert plan(mixes=(AGENTS,)).mirror_gb() * (1 << 30) >= tokens * 131_072
    assert plan(mixes=(DOCUMENTS,)).mirror_tokens() == 64 * (64_800 + PAGE_SIZE)


def test_too_little_host_memory_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_arms, "available_host_memory", lambda: 20 << 30)
    with pytest.raises(ValueError, match="needs 28 GB of host memory, 20 GB are free: free some, or choose a smaller"):
        plan().mirror_gb()


def test_rates_are_multiples_of_a_saturation() -> None:
    given, auto = plan(), plan(rates=())
    assert given.rates_of(AGENTS) == [1.0, 2.0] and not given.unknown(AGENTS)
    assert auto.unknown(AGENTS)
    auto.saturations["agents"] = 1.23
    assert auto.rates_of(AGENTS) == [0.615, 1.23] and not auto.unknown(AGENTS) and auto.unknown(DOCUMENTS)


def test_stock_goes_first_where_its_saturation_is_wanted() -> None:
    lsa, stock = SYSTEMS["lsa"], SYSTEMS["stock"]
    assert [system for system, _ in plan(systems=(lsa, stock)).turns()] == [lsa, stock]
    assert [system for system, _ in plan(systems=(lsa, stock), rates=()).turns()] == [stock, lsa]
    only = plan(systems=(lsa,), rates=())
    assert only.turns() == [(SEARCHED, [AGENTS, DOCUMENTS]), (lsa, [AGENTS, DOCUMENTS])]
    only.saturations["agents"] = 1.0
    assert only.turns() == [(SEARCHED, [DOCUMENTS]), (lsa, [AGENTS, DOCUMENTS])]
    assert only.left(stock, AGENTS) == [], "it was not asked for"


def test_without_a_gpu_stock_has_our_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert servers.module_of(SYSTEMS["stock"]) == STOCK
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert servers.module_of(SYSTEMS["stock"]) == "sglang.launch_server"
    assert {servers.module_of(system) for system in SYSTEMS.values() if system.lsa} == {"sglang_lsa.launch_server"}


# --- rows ------------------------------------------------------------------------------------------------------------

ATTENDING = {"prefill_backend": "fa3", "decode_backend": "fa3", "kv_dtype": "bfloat16", "page_size": 1}


def row(name: str, rate: float = 1.0, mix: Mix = AGENTS, **other: Any) -> dict[str, Any]:
    return plan().labels(SYSTEMS[name], mix, rate) | figures(RUN, OBJECTIVE) | ATTENDING | other


def test_goodput_is_compared_where_stock_has_any(tmp_path: pathlib.Path) -> None:
    rows = [
        row("stock"),
        row("lsa", goodput_per_s=0.4),
        row("stock", 2.0, met_objective=0, goodput_per_s=0.0),
        row("lsa", 2.0, goodput_per_s=0.3),
        row("lsa", mix=DOCUMENTS),
    ]
    LOAD.write(tmp_path, rows)
    gains = {
        (one["mix"], one["rate_per_s"]): one.get("goodput_gain")
        for one in LOAD.read(tmp_path)
        if one["system"] == "lsa"
    }
    assert gains == {("agents", 1.0): 4.0, ("agents", 2.0): None, ("documents", 1.0): None}
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "load.csv").exists()


def test_the_table_has_every_system_at_every_rate() -> None:
    text = io.StringIO()
    rows = [row("lsa", 2.0), row("stock", 2.0), row("lsa", goodput_per_s=0.4, no_first_token=0), row("stock")]
    Console(file=text, width=260).print(load_report.table(rows))
    lines = [line for line in text.getvalue().splitlines() if "8b" in line]
    cells = [[cell.strip() for cell in line.split("│")] for line in lines]
    assert [(row[4], row[5]) for row in cells] == [("1", "stock"), ("1", "lsa"), ("2", "stock"), ("2", "lsa")]
    assert "agents 16" in lines[0] and "7.92+" in lines[0], "what still waits would have waited longer"
    assert "4.00x stock" in lines[1] and "7.92+" not in lines[1]


@pytest.mark.parametrize("rows", [[], [row("stock")], [row("lsa", ttft_s_p99=None)]], ids=["none", "stock", "no TTFT"])
def test_few_rows_have_a_picture(rows: list[dict[str, Any]], tmp_path: pathlib.Path) -> None:
    load_report.plot(tmp_path / "load.png", rows)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


# --- runs that were cut ----------------------------------------------------------------------------------------------


class Bench:
    """A benchmark whose servers take no time; remembers what was measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: pathlib.Path):
        self.output, self.seen = output, []
        self.broken: str | None = None
        self.found = 2.0
        monkeypatch.setattr(load, "gpu_name", lambda benchmark: "GPU of a test")
        monkeypatch.setattr(load, "LOAD", dataclasses.replace(LOAD, draw=lambda path, rows: None))
        monkeypatch.setattr(load, "measure", self.measure)

    def measure(self, plan: Plan, system: Any, mixes: list[Mix], *_: Any) -> Iterator[dict[str, Any]]:
        for mix in mixes:
            if self.broken == system.name:
                raise ServerFailed("no room")
            if plan.unknown(mix):
                assert system == SEARCHED
                self.seen.append((system.name, mix.name, "search"))
                plan.saturations[mix.name] = self.found
            for rate in plan.left(system, mix):
                self.seen.append((system.name, mix.name, rate))
                yield plan.labels(system, mix, rate) | figures(RUN, OBJECTIVE) | ATTENDING

    def run(self, **asked: Any) -> list[tuple[str, str, Any]]:
        chosen: dict[str, Any] = {"models": ["8b"], "mixes": ["agents"], "systems": ["stock", "lsa"], "rates": [1.0]}
        chosen |= {"times": [1.0, 2.0], "seconds": 60.0, "pool_gb": None, "memories": 16, "max_running": 64}
        chosen |= {"objective": OBJECTIVE, "kv_dtype": "auto", "resume": False, "server_args": "", "command": "me"}
        self.seen = []
        load.run(self.output, Console(quiet=True), **(chosen | asked))
        return self.seen


@pytest.fixture
def bench(roomy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


def test_a_run_that_is_resumed_measures_what_is_missing(bench: Bench) -> None:
    both = [("stock", "agents", 1.0), ("lsa", "agents", 1.0)]
    assert bench.run() == both
    assert bench.run(resume=True) == []
    assert bench.run(resume=True, rates=[1.0, 3.0], systems=["lsa"]) == [("lsa", "agents", 3.0)]
    assert bench.run(resume=True, mixes=["agents", "documents"], systems=["stock"]) == [("stock", "documents", 1.0)]
    for other in ({"seconds": 30.0}, {"memories": 8}, {"pool_gb": 8.0}, {"objective": Objective(2.0, 30.0)}):
        assert bench.run(resume=True, **other) == both, "under other conditions"
    for given in ("--mem-fraction-static 0.8", "--mem-fraction-static 0.7"):
        assert bench.run(resume=True, server_args=given) == both, "other servers"
        assert bench.run(resume=True, server_args=given.replace(" ", "  ")) == [], "the same, typed otherwise"
    assert bench.run(resume=True) == [] and bench.run() == both
    rows = LOAD.read(bench.output)
    assert all(one["command"] == "me" and one["gpu"] == "GPU of a test" for one in rows)


def test_servers_with_other_arguments_are_not_compared() -> None:
    rows = [row("stock"), row("lsa"), row("lsa", server_args="--log-level info")]
    assert [found.row["server_args"] for found in LOAD.compare(rows)] == [""]
    text = io.StringIO()
    Console(file=text, width=260).print(load_report.table(rows))
    assert text.getvalue().count("--log-level info") == 1


def test_a_saturation_is_of_servers_with_the_same_arguments(bench: Bench) -> None:
    assert bench.run(rates=[], server_args="--log-level info")[0] == ("stock", "agents", "search")
    assert bench.run(rates=[], resume=True)[0] == ("stock", "agents", "search")
    assert bench.run(rates=[], resume=True, server_args="--log-level info") == []


def test_arguments_that_cannot_be_split_are_refused_before_anything_starts(bench: Bench) -> None:
    with pytest.raises(ValueError, match=r"--server-args --x 'y: cannot be split .No closing quotation"):
        bench.run(server_args="--x 'y")
    assert bench.seen == []


def test_logs_of_other_runs_are_kept(tmp_path: pathlib.Path) -> None:
    """By names that tell system, mixes and arguments apart: a run with other ones used to write over them."""
    others: list[dict[str, Any]] = [{}, {"rates": (3.0,)}, {"seconds": 30.0}, {"objective": Objective(2.0, 30.0)}]
    others += [{"server_args": "--x"}, {"mixes": (AGENTS.with_memories(8),)}, {"times": (4.0,)}]
    logs = [load.log_of(plan(**other), SYSTEMS["lsa"], [AGENTS], tmp_path) for other in others]
    logs += [load.log_of(plan(), SYSTEMS[name], mixes, tmp_path) for name, mixes in LOGGED]
    assert len(set(logs)) == len(logs) and logs[0] == load.log_of(plan(), SYSTEMS["lsa"], [AGENTS], tmp_path)
    assert logs[0].name.startswith("load-lsa-8b-16-auto-agents-")


LOGGED = (("stock", [AGENTS]), ("lsa", [DOCUMENTS]), ("lsa", [AGENTS, DOCUMENTS]))


@pytest.mark.usefixtures("roomy")
def test_all_servers_get_the_arguments_last() -> None:
    flags = plan(server_args="--context-length '7 8'").arguments(SYSTEMS["stock"], pathlib.Path("model"))
    assert flags[-2:] == ["--context-length", "7 8"]


def test_saturation_is_searched_once(bench: Bench) -> None:
    bench.broken = "lsa"
    with pytest.raises(RuntimeError, match="lsa 8b: no room"):
        bench.run(rates=[])
    assert bench.seen == [("stock", "agents", "search"), ("stock", "agents", 2.0), ("stock", "agents", 4.0)]
    bench.broken, bench.found = None, 99.0
    assert bench.run(rates=[], resume=True) == [("lsa", "agents", 2.0), ("lsa", "agents", 4.0)]
    assert {one["stock_saturation_per_s"] for one in LOAD.read(bench.output)} == {2.0}
    assert bench.run(rates=[], systems=["lsa"])[:2] == [("stock", "agents", "search"), ("lsa", "agents", 99.0)]


def test_others_are_not_started_where_stock_could_not_be_searched(tmp_path: pathlib.Path) -> None:
    measured = load.measure(plan(rates=()), SYSTEMS["lsa"], [AGENTS], tmp_path, Console(quiet=True))
    with pytest.raises(RuntimeError, match="the saturation of stock with agents was not found: give --rates"):
        next(measured)
    assert list(tmp_path.iterdir()) == []


class Resting:
    """Stands for a server whose load is as told, one after the other; the last for ever."""

    def __init__(self, *loads: tuple[int, int]):
        self.loads, self.asked = list(loads), 0

    def get(self, path: str) -> dict[str, Any]:
        assert path.startswith("/v1/loads")
        self.asked += 1
        running, waiting = self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]
        return {"loads": [{"num_running_reqs": running, "num_waiting_reqs": waiting}]}


def on(server: Any, **other: Any) -> load.Measurement:
    return load.Measurement(plan(rates=(), **other), SEARCHED, DOCUMENTS, server, Console(quiet=True))


def test_a_server_is_at_rest_when_it_says_so_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.time, "sleep", lambda seconds: None)
    server = Resting((0, 0), (3, 0), (0, 2), (0, 0))
    on(server).wait_until_idle()
    assert server.asked == 5
    monkeypatch.setattr(load, "IDLE_SECONDS", -1)
    with pytest.raises(RuntimeError, match="3 requests still run"):
        on(Resting((1, 2))).wait_until_idle()


def test_a_search_does_not_wait_for_what_is_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float, int]] = []

    def offer(self: load.Measurement, rate: float, patience: float, turn: int) -> Load:
        """The server completes one request a second at most."""
        asked.append((rate, patience, turn))
        ends = np.linspace(1, 30, min(30, round(rate * 30)))
        unfinished = [sent(0.0, [], answer=1)] * max(0, round(rate * 30) - 30)
        return Load(30.0, [*(sent(0.0, [end]) for end in ends.tolist()), *unfinished])

    monkeypatch.setattr(load.Measurement, "offer", offer)
    assert on(None, seconds=30.0).search() == 1.0
    assert asked[-1][0] == 2.0 and {one[1:] for one in asked} == {(0.0, 1)}, (
        "and sends other requests than are measured"
    )
    with pytest.raises(RuntimeError, match="documents: at 1e-09 requests/s none arrives in 30 s"):
        monkeypatch.undo()
        on(None, seconds=30.0).offer(1e-9, 0.0, 0)


def test_a_rate_at_which_nothing_arrives_is_refused_before_anything_starts(bench: Bench) -> None:
    with pytest.raises(ValueError, match="none arrives"):
        bench.run(rates=[1.0, 1e-6])
    assert bench.seen == [] and list(bench.output.iterdir()) == []


# --- command line ----------------------------------------------------------------------------------------------------


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(load, "run", lambda output, console, **asked: seen.append(asked))
    assert cli.main(["bench", "load"]) == 0
    assert cli.main(["bench", "load", "--rates", "0.5,1", "2", "1", "--times", "3", "--ttft", "2", "--tpot", "50"]) == 0
    assert cli.main(["bench", "load", "--rates", "auto", "--pool-gb", "8"]) == 0
    assert [asked["rates"] for asked in seen] == [[], [0.5, 1.0, 2.0], []]
    assert [asked["times"] for asked in seen] == [[0.5, 1.0, 2.0], [3.0], [0.5, 1.0, 2.0]]
    assert [asked["objective"] for asked in seen] == [OBJECTIVE, Objective(2.0, 50.0), OBJECTIVE]
    assert [asked["pool_gb"] for asked in seen] == [None, None, 8.0]
    assert (seen[0]["models"], seen[0]["mixes"], seen[0]["seconds"]) == (["8b"], ["agents", "documents"], 60.0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rates", "0"], "'0': give numbers above 0, or auto alone"),
        (["--rates", "auto", "1"], "'auto': give numbers above 0, or auto alone"),
        (["--rates", "inf"], "'inf': give numbers above 0"),
        (["--times", "auto"], "'auto': give numbers above 0\n"),
        (["--models", "70b"], "choose from 8b, 1b, tiny"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_status_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "load", *argv])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seconds", "0"], "--seconds 0: use a number above 0"),
        (["--pool-gb", "-1"], "--pool-gb -1: use a number above 0"),
        (["--memories", "0"], "--memories 0: use a number above 0"),
        (["--max-running", "0"], "--max-running 0: use a number above 0"),
        (["--ttft", "nan"], "--ttft nan: use a number above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_values_are_status_1(
    argv: list[str], words: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "load", "--output", str(tmp_path / "out"), *argv]) == 1
    assert capsys.readouterr().err == f"sglang-lsa bench: {words}\n"
    assert not (tmp_path / "out").exists()


def test_models_of_a_gpu_need_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["bench", "load", "--output", str(tmp_path / "out")]) == 1
    assert "sglang-lsa bench load needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
