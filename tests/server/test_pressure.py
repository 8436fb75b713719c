"""Under pressure and abuse: retractions, disconnects, aborts, flushes. Nothing is lost, nothing is left."""

from __future__ import annotations

import http.client
import json
import random
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest
from prompts import needle, prose
from serving import (
    assert_idle,
    complete,
    differs_at_a_tie,
    flush,
    generate,
    is_busy,
    running_requests,
    wait_until_idle,
)

from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.mark.release
def test_dense_requests_are_retracted_and_finish(lsa: ServerProcess) -> None:
    """Three dense requests fit the pool as prompts and outgrow it as answers: one is retracted, none says less."""
    flush(lsa)
    prompts = [prose(2960, 50 + i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda p: complete(lsa, p, 260, {"lsa": {"enabled": False}}), prompts))
    assert "Retract requests" in lsa.log.read_text(errors="replace")
    assert [len(answer) for answer in together] == [260] * 3
    for prompt, answer in zip(prompts, together, strict=True):
        alone = complete(lsa, prompt, 40, {"lsa": {"enabled": False}})
        differs_at_a_tie(alone, answer[:40])


@pytest.mark.release
def test_mixed_requests_leave_nothing_behind(lsa: ServerProcess) -> None:
    """120 requests: short, long, shared, pruned, dense, streamed and cut off, aborted, refused."""
    flush(lsa)
    rng = random.Random(0)
    shared = prose(1500, 77)

    def one(i: int) -> str:
        kind = rng_kinds[i]
        prompt = prose(30 + 3 * (i % 40), i) if i % 4 else f"{shared}\n{prose(20, i)}"
        if kind == "disconnect":
            return disconnect_mid_stream(lsa, prompt)
        if kind == "abort":
            return abort_soon(lsa, prompt, f"abort-{i}")
        if kind == "bad":
            try:
                generate(lsa, prompt, budget=2.0)
            except urllib.error.HTTPError as error:
                return f"refused {error.code}"
            return "accepted"
        options = {"plain": {}, "dense": {"enabled": False}, "small": {"budget": 0.05}, "random": {"policy": "random"}}
        answer = generate(lsa, prompt, tokens=4 + i % 12, **options[kind])
        return f"{answer['meta_info']['completion_tokens']} tokens" if answer["text"] is not None else "nothing"

    kinds = ["plain", "dense", "small", "random", "disconnect", "abort", "bad"]
    rng_kinds = rng.choices(kinds, weights=[8, 3, 3, 3, 2, 2, 1], k=120)
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(one, range(120)))
    for i, (kind, outcome) in enumerate(zip(rng_kinds, outcomes, strict=True)):
        expected = {"disconnect": "cut", "abort": "aborted", "bad": "refused 400"}.get(kind, f"{4 + i % 12} tokens")
        assert outcome == expected, f"request {i} ({kind})"
    assert_idle(lsa)
    flush(lsa)


@pytest.mark.release
def test_a_long_prompt_can_be_aborted_between_chunks(lsa: ServerProcess) -> None:
    flush(lsa)
    with ThreadPoolExecutor(2) as pool:
        future = pool.submit(abort_soon, lsa, needle(6500, 0.5, 9).prompt, "abort-chunked")
        assert future.result() == "aborted"
    assert_idle(lsa)
    assert generate(lsa, needle(1500, 0.5, 9).prompt, tokens=4)["meta_info"]["completion_tokens"] == 4


def test_flush_while_busy_is_refused_and_harmless(lsa: ServerProcess) -> None:
    prompt = prose(1200, 5)
    alone = generate(lsa, prompt, tokens=60)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, lsa, prompt, 60)
        while not is_busy(lsa) and not running.done():
            pass
        connection = http.client.HTTPConnection("127.0.0.1", lsa.port, timeout=60)
        connection.request("POST", "/flush_cache")
        connection.getresponse().read()
        assert running.result()["text"] == alone["text"]
    wait_until_idle(lsa)


def disconnect_mid_stream(server: ServerProcess, prompt: str) -> str:
    """Ask for a stream, read a little, hang up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    body = {"text": prompt, "stream": True, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().read(200)
    connection.close()
    return "cut"


def abort_soon(server: ServerProcess, prompt: str, rid: str) -> str:
    """Start a long answer and abort it by name as soon as the server knows it."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, server, prompt, 900, rid)
        while not running.done():
            if any(r["rid"] == rid for r in running_requests(server)):
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                connection.request(
                    "POST", "/abort_request", json.dumps({"rid": rid}), {"Content-Type": "application/json"}
                )
                connection.getresponse().read()
                break
        try:
            answer = running.result()
        except urllib.error.HTTPError as error:
            return "aborted" if error.code in (400, 499, 503) else f"status {error.code}"
        return "aborted" if answer["meta_info"]["finish_reason"]["type"] == "abort" else "finished"
