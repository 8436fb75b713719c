"""What ``bench load`` sends and when, what counts of the answers, and the search for saturation."""

from __future__ import annotations

import asyncio
import collections
import json
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from bench_traffic import AGENTS, DOCUMENTS, OBJECTIVE, RUN, sent

from sglang_lsa.bench.load_client import Load, Sent, body_of, offer, written
from sglang_lsa.bench.load_figures import completed_within, figures, gaps_ms, percentile, tpot_ms, waits
from sglang_lsa.bench.load_mix import MIXES, Mix, Request, arrivals
from sglang_lsa.bench.load_saturation import saturation

VOCABULARY = 128256

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
