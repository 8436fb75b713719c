"""LSA on a GPU, with the real embedded model. Servers check their ledgers, and host against device lengths, always."""

from __future__ import annotations

import http.client
import json
import random
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prompts import needle, prose
from serving import (
    BFLOAT16_STEPS,
    TIE,
    Answer,
    complete,
    flush_cache,
    gap_at_first_difference,
    generate,
    wait_until_idle,
)

from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
NEW_TOKENS = 32
FULL = {"lsa": {"budget": 1.0}}
POLICIES = ("quest", "indexer")


@pytest.fixture(autouse=True)
def nothing_is_left(servers: dict[str, ServerProcess]) -> Iterator[None]:
    yield
    for name in servers.keys() - {"stock"}:
        assert servers[name].process.poll() is None
        physical = wait_until_idle(servers[name])["physical"]
        assert (physical["held"], physical["promised"]) == (0, 0)


def prompts() -> list[str]:
    """30 prompts of 50 to 7,000 tokens; the last five continue a shared prefix."""
    plain = [prose(length, length) for length in range(50, 1050, 50)]
    long = [needle(length, 0.3, length).prompt for length in (1500, 2300, 3400, 4700, 6900)]
    shared = prose(1500, 99)
    return [*plain, *long, *(f"{shared} {prose(40 + 7 * i, 200 + i)}" for i in range(5))]


def answers(server: ServerProcess, custom_params: dict | None = None) -> list[Answer]:
    """One prompt at a time, from an empty cache: batches of the same shape on every server."""
    flush_cache(server)
    return [complete(server, prompt, NEW_TOKENS, custom_params) for prompt in prompts()]


def compare(reference: list[Answer], seen: list[Answer], name: str, tie: float = TIE) -> int:
    """Print and check; returns how many are equal.

    Args:
        tie: how far apart two tokens may be where the answers part.
    """
    gaps = {
        number: gap
        for number, pair in enumerate(zip(reference, seen, strict=True))
        if (gap := gap_at_first_difference(*pair)) is not None
    }
    print(f"\n{name}: {len(reference) - len(gaps)} of {len(reference)} equal; gaps where others part: {gaps}")
    assert all(gap <= tie for gap in gaps.values()), "an answer parts where the reference leaves no doubt"
    return len(reference) - len(gaps)


def test_full_budget_equals_stock(stock: ServerProcess, lsa: ServerProcess) -> None:
    assert compare(answers(stock), answers(lsa, FULL), "budget 1.0 against stock") >= 25


def test_full_budget_equals_stock_with_flash_attention_alone(stock: ServerProcess, fa3: ServerProcess) -> None:
    """Stock decodes with FlashInfer here, so bfloat16 sums differ; ``test_families`` has stock with FA3, bit by bit."""
    assert compare(answers(stock), answers(fa3, FULL), "budget 1.0 by FA3 against stock", BFLOAT16_STEPS) >= 15
    assert fa3.get("/lsa/status")["graphless_steps"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_flash_attention_reads_the_same_pages(policy: str, eager: ServerProcess, fa3: ServerProcess) -> None:
    """With graphs, over pages; FlashInfer without graphs, over slots."""
    options = {"lsa": {"policy": policy}}
    name = f"{policy}: FA3 with CUDA graphs against FlashInfer without, budget 13.5 %"
    assert compare(answers(eager, options), answers(fa3, options), name, BFLOAT16_STEPS) >= 15


def test_dense_batches_need_no_room_in_the_graphs_of_flash_attention(fa3: ServerProcess) -> None:
    shared = prose(6500, 5)
    generate(fa3, shared, 1)
    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(lambda i: generate(fa3, f"{shared} {i % 2}", 70, budget=1.0)["text"], range(32)))
    assert fa3.get("/lsa/status")["graphless_steps"] == 0
    assert len(set(texts)) <= 16


@pytest.mark.parametrize("policy", POLICIES)
def test_graphs_change_nothing(policy: str, lsa: ServerProcess, eager: ServerProcess) -> None:
    options = {"lsa": {"policy": policy}}
    name = f"{policy}: with CUDA graphs against without, budget 13.5 %"
    assert compare(answers(lsa, options), answers(eager, options), name) >= 25


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_agree_with_single_requests(policy: str, lsa: ServerProcess) -> None:
    """Needles found alone are found together, over a pool of a third of their pages."""
    needles = [needle(6800, depth / 10, 40 + depth) for depth in range(1, 10)]
    with ThreadPoolExecutor(len(needles)) as pool:
        found = list(pool.map(lambda n: generate(lsa, n.prompt, 40, policy=policy)["text"], needles))
    alone = [generate(lsa, n.prompt, 40, policy="full")["text"] for n in needles]
    right = [sum(n.answer in text for n, text in zip(needles, texts, strict=True)) for texts in (alone, found)]
    print(f"\nneedles found: full attention alone {right[0]}, {policy} together {right[1]} of {len(needles)}")
    assert right[1] >= right[0] - 1
    assert lsa.get("/lsa/status")["recalls"]["pages"] > 0


def test_windows_are_refreshed_and_pages_recalled(lsa: ServerProcess) -> None:
    """Random pages: nearly the whole set changes every window."""
    before = lsa.get("/lsa/status")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: generate(lsa, prose(5000, 300 + i), 300, policy="random"), range(6)))
    after = lsa.get("/lsa/status")
    assert after["refreshes"] - before["refreshes"] >= 6 * 5
    assert after["recalls"]["pages"] > before["recalls"]["pages"]
    assert after["fallbacks"] == before["fallbacks"]
    assert after["physical"]["overhead_bytes"]["graph_indices"] > 0


def test_256_requests_at_once(lsa: ServerProcess) -> None:
    def ask(i: int) -> int:
        return generate(lsa, prose(30 + i % 40, i), 60)["meta_info"]["completion_tokens"]

    with ThreadPoolExecutor(256) as pool:
        assert list(pool.map(ask, range(256))) == [60] * 256


def test_dense_batches_beyond_the_graph_buffers(lsa: ServerProcess) -> None:
    """Requests that share a prefix may read more slots together than the graphs have; they then run without one."""
    shared = prose(6500, 5)
    generate(lsa, shared, 1)
    before = lsa.get("/lsa/status")["graphless_steps"]
    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(lambda i: generate(lsa, f"{shared} {i % 2}", 70, budget=1.0)["text"], range(64)))
    assert lsa.get("/lsa/status")["graphless_steps"] > before
    assert len(set(texts)) <= 16  # two questions; batches of other shapes may break a tie


def test_500_requests_with_aborts_leave_nothing(lsa: ServerProcess) -> None:
    """Mixed lengths, policies and budgets; one in five is aborted while it waits, prefills or decodes."""
    rng = random.Random(0)

    def ask(i: int) -> str:
        length, tokens = rng.choice((40, 300, 1500, 4000)), rng.choice((1, 20, 100, 200))
        options = rng.choice(({}, {"policy": "random"}, {"budget": 1.0}, {"enabled": False}, {"budget": 0.3}))
        rid = f"request-{i:03}"  # SGLang aborts every request whose name begins like this
        if i % 5 == 0:
            return aborted(lsa, prose(length, i % 60), rid, polls=i % 17)
        return generate(lsa, prose(length, i % 60), tokens, rid, **options)["meta_info"]["finish_reason"]["type"]

    with ThreadPoolExecutor(40) as pool:
        ends = list(pool.map(ask, range(500)))
    assert ends.count("length") >= 400
    assert ends.count("abort") >= 50


def aborted(server: ServerProcess, prompt: str, rid: str, polls: int) -> str:
    """Ask for a long answer, look at the server's status a few times, then abort it by name until it ends."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate, server, prompt, 2000, rid)
        for _ in range(polls):
            server.get("/lsa/status")
        while not answer.done():
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("POST", "/abort_request", json.dumps({"rid": rid}), {"Content-Type": "application/json"})
            connection.getresponse().read()
            connection.close()
        try:
            return answer.result()["meta_info"]["finish_reason"]["type"]
        except urllib.error.HTTPError:
            return "abort"  # it was still waiting
