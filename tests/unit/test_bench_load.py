"""``bench load`` without a GPU: what is sent and when, what counts, the search, what need not run again."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from sglang_lsa import cli
from sglang_lsa.bench import load, load_report, servers, serving_arms
from sglang_lsa.bench.load_client import Load, Sent, body_of, offer, written
from sglang_lsa.bench.load_figures import Objective, completed_within, figures, gaps_ms, percentile, tpot_ms, waits
from sglang_lsa.bench.load_mix import MIXES, Mix, Request, arrivals
from sglang_lsa.bench.load_plan import SEARCHED, Plan
from sglang_lsa.bench.load_report import LOAD
from sglang_lsa.bench.load_saturation import saturation
from sglang_lsa.bench.serving_arms import Group
from sglang_lsa.bench.systems import SYSTEMS
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.server_process import STOCK, ServerFailed
from sglang_lsa.streaming import Stream

VOCABULARY = 128256
AGENTS, DOCUMENTS = MIXES["agents"], MIXES["documents"]
OBJECTIVE = Objective(5.0, 30.0)

# --- what is sent, and when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.3, 4.0, 50.0])
def test_arrivals_have_the_rate_and_are_those_of_a_poisson_process(rate: float) -> None:
    times = arrivals(rate, 20_000 / rate, np.random.default_rng(1))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.05), "exponential: as wide as its mean"
    assert np.mean(gaps > 1 / rate) == pytest.approx(np.exp(-1), abs=0.02)
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=0.03), "of no gap on the one before it"


def facts(requests: list[Request]) -> list[tuple[Any, ...]]:
    return [(one.at, one.memory, one.answer, one.own.tolist()) for one in requests]


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_the_same_requests_every_time(mix: Mix) -> None:
    mix = mix.smaller(16)
    once = mix.requests(2.0, 30.0, VOCABULARY)
    assert facts(once) == facts(mix.requests(2.0, 30.0, VOCABULARY))
    assert [one.at for one in once] == sorted(one.at for one in once) and once[0].at >= 0 and once[-1].at < 30
    for other in (mix.requests(2.0, 30.0, VOCABULARY, turn=1), mix.requests(2.5, 30.0, VOCABULARY)):
        beginnings = {tuple(one.own[:8]) for one in once} & {tuple(one.own[:8]) for one in other}
        assert not beginnings, "nothing that another run left in the cache"


def test_agents_ask_about_all_memories_and_documents_are_new() -> None:
    agents = AGENTS.requests(20.0, 60.0, VOCABULARY)
    asked = collections.Counter(one.memory for one in agents)
    assert sorted(asked) == list(range(16))
    assert max(asked.values()) < 2 * min(asked.values())
    assert {len(one.own) for one in agents} == {1000}
    documents = DOCUMENTS.requests(5.0, 60.0, VOCABULARY)
    lengths = np.array([len(one.own) for one in documents])
    assert {one.memory for one in documents} == {None}
    assert lengths.min() >= 8000 and lengths.max() <= 64_000
    assert np.median(lengths) == pytest.approx((8000 * 64_000) ** 0.5, rel=0.15)
    for requests in (agents, documents):
        answers = np.array([one.answer for one in requests])
        assert answers.min() >= 200 and answers.max() <= 800
        assert answers.mean() == pytest.approx(500, rel=0.1)
        ids = np.concatenate([one.own for one in requests])
        assert ids.min() >= 10 and ids.max() < VOCABULARY


def test_memories_are_of_all_lengths_and_the_same_every_time() -> None:
    texts = AGENTS.memory_texts(VOCABULARY)
    assert [len(text) for text in texts] == AGENTS.memory_lengths
    assert (len(texts[0]), len(texts[-1]), len(texts)) == (32_000, 128_000, 16)
    assert len({tuple(text[:8]) for text in texts}) == 16
    assert all((a == b).all() for a, b in zip(texts, AGENTS.memory_texts(VOCABULARY), strict=True))
    assert AGENTS.longest == 128_000 + 1000 + 800
    assert DOCUMENTS.memory_texts(VOCABULARY) == [] and DOCUMENTS.longest == 64_800
    assert DOCUMENTS.with_memories(4) == DOCUMENTS
    assert AGENTS.with_memories(4).memory_lengths == [32_000, 50_797, 80_635, 128_000]


def test_lengths_are_divided_for_small_machines() -> None:
    small = AGENTS.smaller(64)
    assert (small.own, small.answer, small.memory) == ((15, 15), (3, 12), (500, 2000))
    assert AGENTS.smaller(10_000).answer == (2, 2), "two tokens have a time between them"
    assert AGENTS.smaller(1).own == AGENTS.own


def test_a_rate_at_which_nothing_arrives_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at 0.001 requests/s none arrives in 1 s: use more --seconds or --rates"):
        AGENTS.requests(0.001, 1.0, VOCABULARY)


def test_a_request_begins_with_its_memory() -> None:
    memories = [written(np.array([11, 12])), written(np.array([13]))]
    body = json.loads(body_of(Request(0.0, 1, np.array([20, 21]), 7), memories))
    assert body["input_ids"] == [13, 20, 21] and body["stream"]
    assert body["sampling_params"] == {"temperature": 0, "max_new_tokens": 7, "ignore_eos": True}
    assert json.loads(body_of(Request(0.0, None, np.array([20]), 7), memories))["input_ids"] == [20]


# --- what counts -----------------------------------------------------------------------------------------------------


def sent(at: float, times: list[float], answer: int = 0, **more: Any) -> Sent:
    """A token came at each of the times; it is done when those are as many as it asked for (by default they are)."""
    tokens = list(range(1, len(times) + 1))
    answer = answer or len(times)
    stream = Stream(at, times, tokens, done=len(times) == answer, usage={"prompt_tokens": 10, "cached_tokens": 5})
    return Sent(Request(at, None, np.array([1]), answer), stream, **more)


def test_latencies_count_from_arrival() -> None:
    one = sent(2.0, [3.5, 4.0, 5.5])
    assert waits(Load(10.0, [one], 12.0)).tolist() == [1.5]
    assert tpot_ms(one) == 1000.0
    assert gaps_ms(one).tolist() == [500.0, 1500.0]
    assert tpot_ms(sent(0.0, [1.0])) == 0.0 and not len(gaps_ms(sent(0.0, [1.0])))


def test_several_tokens_of_one_chunk_share_its_time() -> None:
    one = sent(0.0, [1.0, 2.0, 3.0])
    one.stream.tokens = [1, 5, 6]
    assert gaps_ms(one).tolist() == [250.0, 1000.0]
    assert tpot_ms(one) == 400.0


@pytest.mark.parametrize(
    ("one", "met"),
    [
        (sent(1.0, [6.0, 6.029]), True),
        (sent(1.0, [6.01, 6.02]), False),
        (sent(1.0, [2.0, 2.01, 2.059]), True),
        (sent(1.0, [2.0, 2.01, 2.07]), False),
        (sent(1.0, [2.0, 2.01], answer=3), False),
        (sent(1.0, [], answer=3), False),
    ],
    ids=["just", "first token late", "slow once", "slow on average", "unfinished", "nothing came"],
)
def test_the_objective_is_first_token_and_mean_pace_of_a_finished_answer(one: Sent, met: bool) -> None:
    assert OBJECTIVE.met(one) == met


def test_nothing_that_could_meet_the_objective_is_dropped() -> None:
    """The slowest request that meets it is done when patience ends."""
    slowest = sent(0.0, [5.0, *(5.0 + 0.03 * number for number in range(1, 10))])
    assert OBJECTIVE.met(slowest)
    assert slowest.stream.times[-1] <= OBJECTIVE.patience(10)


RUN = Load(
    10.0,
    [
        sent(0.0, [1.0, 1.02, 1.04]),
        sent(1.0, [7.0, 7.02], lag=0.25),  # its first token is late
        sent(9.0, [9.5, 10.5, 11.0]),  # done after the last arrival, and slow
        sent(9.5, [9.75, 9.77, 9.79], answer=50),  # not done when the run ended
        sent(4.0, [], answer=9),  # still waits
        sent(5.0, [], answer=9, refused="HTTP 400: too long"),
    ],
    end=12.0,
    running=[1, 2, 6],
    waiting=[0, 0, 4],
)


def test_every_request_is_counted_once() -> None:
    RUN.sent[0].stream.usage["num_retractions"] = 2
    found = figures(RUN, OBJECTIVE)
    assert found["requests"] == found["completed"] + found["unfinished"] + found["refused"] == 6
    assert found["requests"] == found["met_objective"] + found["late"] + found["refused"]
    assert (found["completed"], found["unfinished"], found["refused"], found["met_objective"]) == (3, 2, 1, 1)
    assert found["goodput_per_s"] == 0.1
    assert found["completed_per_s"] == 0.2, "two were done while requests arrived"
    assert found["output_tokens_per_s"] == (3 + 2 + 1 + 3) / 10
    assert (found["running_mean"], found["running_max"], found["waiting_max"]) == (3.0, 6, 4)
    assert (found["retractions"], found["client_lag_s_max"], found["cached_fraction"]) == (2, 0.25, 0.5)


def test_percentiles_have_those_that_still_wait() -> None:
    found = figures(RUN, OBJECTIVE)
    first = [1.0, 6.0, 0.5, 0.25, 8.0]
    assert waits(RUN).tolist() == first, "8 s until the end of the run, and nothing of the one refused"
    assert found["no_first_token"] == 1
    assert found["ttft_s_p50"] == 1.0 and found["ttft_s_p99"] == pytest.approx(np.percentile(first, 99))
    assert found["itl_ms_p50"] == pytest.approx(20.0)
    assert [percentile([1.0, 2.0, 3.0], q) for q in (0, 50, 100)] == [1, 2, 3]
    assert percentile([], 50) is None


def test_a_run_in_which_nothing_was_answered_has_figures() -> None:
    found = figures(Load(10.0, [sent(1.0, [], answer=3, refused="no")], 10.0), OBJECTIVE)
    assert (found["requests"], found["refused"], found["goodput_per_s"]) == (1, 1, 0.0)
    none = ("ttft_s_p50", "ttft_s_p99", "itl_ms_p50", "itl_ms_p99", "running_mean", "running_max", "cached_fraction")
    assert [found[name] for name in none[:-1]] == [None] * 6


# --- the search ------------------------------------------------------------------------------------------------------


class MadeUp:
    """A server that serves one request after the other in ``1 / capacity`` seconds, and then answers for a while."""

    def __init__(self, capacity: float, answering: float = 6.0, worse: float = 0.0):
        self.capacity, self.answering, self.worse = capacity, answering, worse
        self.rates: list[float] = []

    def probe(self, rate: float, seconds: float = 60.0) -> tuple[float, float]:
        self.rates.append(rate)
        times = arrivals(rate, seconds, np.random.default_rng((3, len(self.rates))))
        each, free, done = (1 + self.worse * rate) / self.capacity, 0.0, []
        for at in times:
            free = max(free, at) + each
            done.append(free + self.answering)
        run = Load(seconds, [sent(0.0, [end]) for end in done])
        return len(times) / seconds, completed_within(run, seconds / 3, seconds) / (seconds * 2 / 3)


@pytest.mark.parametrize("capacity", [0.2, 0.9, 1.7, 3.0, 6.5, 40.0])
def test_saturation_is_what_a_server_can_do(capacity: float) -> None:
    server = MadeUp(capacity)
    assert saturation(server.probe, 0.5) == pytest.approx(capacity, rel=0.15)
    assert server.rates == [0.5 * 2**number for number in range(len(server.rates))]
    assert server.rates[-1] < 5 * capacity or len(server.rates) == 1, "it is not searched far above"


def test_a_server_that_does_less_under_more_load_is_saturated_before() -> None:
    assert saturation(MadeUp(4.0, worse=0.5).probe, 0.5) > 1.0


def test_saturation_has_three_digits() -> None:
    assert saturation(lambda rate: (rate, min(rate, 1.23456)), 0.5) == 1.23


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (lambda rate: (rate, 0.0), "nothing was completed at 0.5 requests/s: use more --seconds, or give --rates"),
        (lambda rate: (rate, rate), "keeps up with 1024 requests/s: use more --seconds, or give --rates"),
    ],
    ids=["nothing", "everything"],
)
def test_a_search_that_finds_nothing_says_so(probe: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        saturation(probe, 0.5)


# --- the client ------------------------------------------------------------------------------------------------------


class Answering:
    """A server that answers each prompt by its first token: 20 at once, 21 never, 22 with a refusal, 23 too little."""

    def __init__(self) -> None:
        self.came: list[tuple[float, int]] = []

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.text())
        kind, tokens = body["input_ids"][0], body["sampling_params"]["max_new_tokens"]
        self.came.append((asyncio.get_running_loop().time(), kind))
        if kind == 22:
            return web.Response(status=400, text="too long")
        answer = web.StreamResponse()
        await answer.prepare(request)
        for number in range(1, 2 if kind == 23 else tokens + 1):
            if kind == 21:
                await asyncio.Event().wait()
            chunk = {"meta_info": {"completion_tokens": number, "prompt_tokens": 1}}
            await answer.write(f"data: {json.dumps(chunk)}\n\n".encode())
        return answer

    async def loads(self, request: web.Request) -> web.Response:
        assert request.query_string == "include=core"
        return web.json_response({"loads": [{"num_running_reqs": 2, "num_waiting_reqs": 1}] * 2})


def offered(kinds: list[int], seconds: float, patience: float, gap: float = 0.02) -> tuple[Load, Answering]:
    async def run() -> tuple[Load, Answering]:
        answering = Answering()
        app = web.Application()
        app.add_routes([web.post("/generate", answering.generate), web.get("/v1/loads", answering.loads)])
        async with TestServer(app) as server:
            url = str(server.make_url("")).rstrip("/")
            requests = [Request(gap * n, None, np.array([kind]), 3) for n, kind in enumerate(kinds)]
            return await offer(url, requests, [], seconds, patience), answering

    return asyncio.run(run())


def test_requests_are_sent_at_their_times_whatever_came_of_others() -> None:
    found, answering = offered([21, 20, 22, 23, 20], seconds=0.2, patience=0.1, gap=0.03)
    assert [kind for _, kind in answering.came] == [21, 20, 22, 23, 20]
    gaps = np.diff([at for at, _ in answering.came])
    assert gaps.sum() == pytest.approx(0.12, abs=0.1), "although the first was never answered"
    assert [one.done for one in found.sent] == [False, True, False, False, True]
    assert [one.refused for one in found.sent] == [None, None, "HTTP 400: too long", "ended after 1 of 3 tokens", None]
    assert found.end >= 0.3 - 0.01, "what is unfinished is waited for"
    assert all(one.stream.times[0] >= one.request.at for one in found.sent if one.done), "on the clock of the run"
    assert all(one.stream.times[-1] < 2 for one in found.sent if one.done)
    assert found.running and set(found.running) == {4} and set(found.waiting) == {2}, "of two ranks"
    counts = figures(found, OBJECTIVE)
    assert (counts["completed"], counts["unfinished"], counts["refused"]) == (2, 1, 2)


def test_a_run_ends_when_everything_is_answered() -> None:
    found, _ = offered([20, 20], seconds=0.2, patience=60.0)
    assert found.end == pytest.approx(0.2, abs=0.15)
    assert all(one.done for one in found.sent)


def test_a_server_that_is_gone_refuses_everything() -> None:
    request = Request(0.0, None, np.array([20]), 3)
    found = asyncio.run(offer("http://127.0.0.1:9", [request], [], 0.1, 0.1))
    assert found.sent[0].refused and not found.running


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
