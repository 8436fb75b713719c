"""More context than device memory: everything finishes with the right tokens, and sharing is real."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from prompts import needle, prose
from serving import (
    complete,
    differs_at_a_tie,
    finished_request,
    flush,
    generate,
    wait_until_idle,
)

from sglang_lsa.client import get_requests
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_more_context_than_device_memory(lsa: ServerProcess) -> None:
    """Eight requests of 2-6K tokens together need more than twice the device pool; each says what it says alone."""
    flush(lsa)
    lengths = (2000, 2500, 3000, 3500, 4000, 4600, 5200, 6000)
    prompts = [prose(length, seed) for seed, length in enumerate(lengths)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: complete(lsa, prompt, 24), prompts))
    status = lsa.get("/lsa/status")
    assert status["virtual"]["allocated"] > 2 * status["physical"]["pages"], "the prompts' pages are all in the tree"
    assert status["evictions"] > 0
    alone = [complete(lsa, prompt, 24) for prompt in prompts]
    assert lsa.get("/lsa/status")["recalls"]["pages"] > status["recalls"]["pages"]
    ties = sum(differs_at_a_tie(*pair) for pair in zip(alone, together, strict=True))
    print(f"{len(prompts) - ties} of {len(prompts)} equal, {ties} differ at a tie")


@pytest.mark.release
def test_prefix_that_left_the_device_comes_back(lsa: ServerProcess) -> None:
    """A cached document is evicted from the device by others; asking again recalls it and changes nothing."""
    flush(lsa)
    document = needle(4000, 0.5, 11)
    first = generate(lsa, document.prompt, enabled=False)
    for seed in (31, 32):
        generate(lsa, prose(5000, seed), tokens=2)
    before = lsa.get("/lsa/status")["recalls"]["pages"]
    again = generate(lsa, document.prompt, enabled=False)
    after = lsa.get("/lsa/status")
    assert again["meta_info"]["cached_tokens"] > 3500
    assert after["recalls"]["pages"] > before
    assert again["text"] == first["text"]


@pytest.mark.release
def test_shared_prefix_is_held_once(lsa: ServerProcess) -> None:
    """Two running requests over one prefix: one host copy, and the union of their resident sets on the device."""
    flush(lsa)
    document = needle(3000, 0.5, 21).prompt
    prefix = generate(lsa, document, tokens=1)["meta_info"]["prompt_tokens"]
    host_before = lsa.get("/lsa/status")["host"]["pages"]
    with ThreadPoolExecutor(2) as pool:
        questions = [f"{document}\n{prose(40, seed)}" for seed in (1, 2)]
        running = [pool.submit(generate, lsa, q, 150, f"share-{i}") for i, q in enumerate(questions)]
        sets, before, status = {}, {}, {"running": {"decoding": 0}}
        while status["running"]["decoding"] < 2 or status["physical"] != before.get("physical"):
            assert not all(future.done() for future in running), "both ended before both were seen running"
            before = lsa.get("/lsa/status")
            sets = {rid: entry for rid in ("share-0", "share-1") for entry in get_requests(lsa.url, rid)["running"]}
            status = lsa.get("/lsa/status")  # nothing moved while the sets were asked for
        answers = [future.result() for future in running]
    assert all(answer["meta_info"]["cached_tokens"] >= prefix - 2 * 64 for answer in answers)
    separate = sum(r["resident_pages"] for r in sets.values())
    held = status["physical"]["held"]
    assert max(r["resident_pages"] for r in sets.values()) <= held < separate
    assert held == len(set(sets["share-0"]["resident"]) | set(sets["share-1"]["resident"]))
    # Only what follows the shared prefix was added to the host copy.
    assert lsa.get("/lsa/status")["host"]["pages"] - host_before <= 2 * 4


def test_the_same_prompt_at_the_same_time(lsa: ServerProcess) -> None:
    """Three requests prefill the same prompt at once; the tree keeps one copy, and nobody notices."""
    flush(lsa)
    prompt = prose(1300, 41)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: complete(lsa, prompt, 70), range(3)))
    status = wait_until_idle(lsa)
    assert status["virtual"]["allocated"] == status["host"]["pages"] <= pages_spanned(1400, PAGE_SIZE)
    for other in answers[1:]:
        differs_at_a_tie(answers[0], other)


def test_decode_reads_the_budget_only(lsa: ServerProcess) -> None:
    generate(lsa, needle(4000, 0.5, 5).prompt, tokens=100, rid="budgeted", budget=0.2)
    seen = finished_request(lsa, "budgeted")
    assert seen["resident_pages"] <= seen["context_pages"] * 0.2 + 2, "budget, and the pages opened in this window"
    assert len(seen["history"]) >= 2
    for positions in seen["history"]:
        assert 0 in positions and len(positions) <= seen["context_pages"] * 0.2
