"""Memory of a tiny DeepSeek-V4 on a GPU: what is not there is not touched, prefixes are shared, and nothing is lost."""

from __future__ import annotations

import http.client
import json
import pathlib
import random
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest
from dsv4_model import PAGE_BYTES, PAGE_TOKENS
from dsv4_pools import DEVICE_PAGES, FEW_PAGES, VIRTUAL_PAGES
from dsv4_servers import (
    Noise,
    Said,
    ask,
    ask_together,
    check_all,
    on_both,
    random_ids,
)
from serving import finished_request, flush, flush_cache

from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]


# -- what is not there is not touched ----------------------------------------------------------------------------------


def test_free_pages_hold_nan_and_nobody_reads_them(
    folder: pathlib.Path, lsa: ServerProcess, ordered: ServerProcess, noise: Noise
) -> None:
    """Random sets over a pool that is too small for all requests; each is asked once more, alone, on a server that
    keeps what free pages held."""
    flush(lsa)
    prompts = [random_ids(length, length) for length in (16_000, 16_300, 16_500, 17_000, 17_400, 17_900)]
    rids = [f"poison-{len(prompt)}" for prompt in prompts]
    before, filled = lsa.get("/lsa/status"), int((folder / "poisoned").read_text())
    seen = ask_together(lsa, prompts, 200, rids, [{"policy": "random", "budget": 0.3}] * len(prompts))
    after = lsa.get("/lsa/status")
    recalled = after["recalls"]["pages"] - before["recalls"]["pages"]
    filled = int((folder / "poisoned").read_text()) - filled
    print(f"\n{recalled} pages recalled, {filled} filled with NaN")
    assert all(answer.finite for answer in seen)
    assert recalled > 0
    assert filled > 0
    for rid, prompt, answer in list(zip(rids, prompts, seen, strict=True))[::2]:
        sets = finished_request(lsa, rid)["sets"]
        assert len(sets.split(";")) >= 3
        noise.check(rid, ask(ordered, prompt, 200, sets=sets), answer, "together")


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_same_slots_take_fewer_bytes(folder: pathlib.Path, stock: ServerProcess, lsa: ServerProcess) -> None:
    """Entries and index keys are as many as the device pool has pages; everything else is what SGLang makes it."""
    pools = [json.loads((folder / f"pools-{name}.json").read_text()) for name in ("stock", "lsa")]
    print("\n" + "\n".join(f"{name:32} {pools[0][name]:12,} {pools[1].get(name, 0):12,}" for name in pools[0]))
    status = lsa.get("/lsa/status")
    assert status["virtual"]["pages"] == VIRTUAL_PAGES
    assert status["physical"]["pages"] == DEVICE_PAGES
    assert status["page_bytes"] == PAGE_BYTES
    paged = ("c4_kv_pool", "c4_indexer_kv_pool")
    for name, size in pools[0].items():
        if name == "layer_mapping":
            continue  # the entries of both kinds once more, by layer
        expected = size * (DEVICE_PAGES + 1) / (VIRTUAL_PAGES + 1) if name in paged else size
        assert pools[1][name] == pytest.approx(expected, rel=0.02), name
    kept = sum(status["physical"]["overhead_bytes"].values())
    totals = [sum(pool[name] for name in paged) for pool in pools]
    print(f"entries and index keys: {totals[0]:,} bytes, with LSA {totals[1]:,} and {kept:,} beside them")
    assert totals[1] + kept < totals[0]
    assert totals[1] >= status["physical"]["kv_bytes"] > 0.98 * totals[1]


# -- the radix tree ----------------------------------------------------------------------------------------------------


def test_prefixes_are_found_as_in_stock(stock: ServerProcess, lsa: ServerProcess, noise: Noise) -> None:
    """A document, questions behind it, and the same after its windows have been given up for those of others: then it
    is computed once more, and the tree takes the new pages or keeps its own."""
    document, questions = random_ids(9100, 11), [random_ids(300, 20 + number) for number in range(4)]
    others = [random_ids(700, 100 + number) for number in range(130)]

    def question(server: ServerProcess) -> list[Said]:
        flush_cache(server)
        asked = [document, document + questions[0], document + questions[0], document + questions[1]]
        said = [ask(server, prompt, 20, budget=1.0) for prompt in asked]
        for other in others:
            ask(server, other, 1)
        asked = [document + questions[2], document + questions[3], document + questions[0], document]
        said += [ask(server, prompt, 20, budget=1.0) for prompt in asked]
        together = random_ids(9100, 12)
        said += ask_together(server, [together] * 3, 20, lsa=[{"budget": 1.0}] * 3)
        return [*said, ask(server, together + questions[0], 20, budget=1.0)]

    expected, seen = on_both(stock, lsa, question)
    check_all(noise, "shared", expected, seen, "together")
    cached = [[answer.cached for answer in said] for said in (expected, seen)]
    print(f"cached tokens: {cached[0]}, with LSA {cached[1]}")
    one_by_one = list(zip(*cached, strict=True))[: -3 - 1]
    assert all(with_lsa >= without for without, with_lsa in one_by_one)
    assert cached[1][1] > 0


def test_requests_share_pages_and_their_copies(lsa: ServerProcess) -> None:
    flush(lsa)
    document = random_ids(12_000, 13)
    ask(lsa, document, 1)
    one = lsa.get("/lsa/status")["host"]["pages"]
    prompts = [document + random_ids(260, 30 + number) for number in range(6)]
    ask_together(lsa, prompts, 70)
    six = lsa.get("/lsa/status")["host"]["pages"]
    print(f"\nhost pages of one document {one}, and of six requests over it {six}")
    assert one >= 12_000 // PAGE_TOKENS
    assert six - one <= 6 * 3


# -- nothing is lost ---------------------------------------------------------------------------------------------------


def test_2000_requests_with_aborts_leave_nothing(lsa: ServerProcess) -> None:
    rng = random.Random(0)
    before = lsa.get("/lsa/status")

    def request(number: int) -> str:
        length = rng.choice((20, 200, 255, 256, 600, 1500, 3000)) if number % 50 else 16_000
        options = rng.choice(({}, {"policy": "random"}, {"budget": 1.0}, {"enabled": False}, {"budget": 0.3}))
        prompt, tokens, rid = random_ids(length, number % 90), rng.choice((1, 2, 8, 40)), f"many-{number:04}"
        if number % 9 == 0:
            return aborted(lsa, prompt, rid, polls=number % 5)
        said = ask(lsa, prompt, tokens, rid, **options)
        assert said.finite
        return "length"

    with ThreadPoolExecutor(32) as pool:
        ends = list(pool.map(request, range(2000)))
    after = lsa.get("/lsa/status")
    print(f"\n{ends.count('length')} ended, {ends.count('abort')} aborted, {after['pressure']}")
    assert ends.count("length") >= 1700
    assert ends.count("abort") >= 100
    assert after["recalls"]["pages"] > before["recalls"]["pages"]


def test_requests_that_are_retracted_are_answered_whole(retracting: ServerProcess) -> None:
    """Their answers are prefilled with their prompts then, and what others read stays."""
    rng = random.Random(1)
    options = ({}, {"policy": "random"}, {"budget": 1.0}, {"enabled": False}, {"budget": 0.3})
    asked = [
        (rng.choice((20, 255, 256, 1500, 3000)) if number % 20 else 16_000, rng.choice((40, 300)), rng.choice(options))
        for number in range(120)
    ]

    def request(number: int) -> Said:
        length, tokens, how = asked[number]
        return ask(retracting, random_ids(length, 500 + number % 60), tokens, f"retracted-{number:03}", **how)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(request, range(len(asked))))
    retractions = [said.retractions for said in answers]
    print(f"\n{sum(retractions)} retractions of {sum(map(bool, retractions))} requests")
    assert [len(said.tokens) for said in answers] == [tokens for _, tokens, _ in asked]
    assert all(said.finite for said in answers)
    assert sum(map(bool, retractions)) >= 5
    assert "Testing retraction" in retracting.log.read_text(errors="replace"), "as one that decodes, not by a pause"
    flush(retracting)


def aborted(server: ServerProcess, prompt: list[int], rid: str, polls: int) -> str:
    """Ask for a long answer, look at the server's status a few times, then abort it by name until it ends."""
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}, "rid": rid}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/generate", body)
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


def test_a_prompt_beyond_the_device_pool_is_refused(ordered: ServerProcess) -> None:
    """All of a prompt's pages are on the device while it is computed."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(ordered, random_ids((FEW_PAGES + 4) * PAGE_TOKENS, 5), 1)
    assert refused.value.code == 400
    print("\n" + refused.value.read().decode())
