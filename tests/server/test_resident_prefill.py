"""``prefill="resident"``: a question about a long memory reads a part of it, and leaves the tree as it was."""

from __future__ import annotations

import pytest
from prompts import needle, prose
from serving import finished_request, flush, generate, wait_until_idle

from sglang_lsa.server_process import ServerProcess

pytestmark = pytest.mark.server


def test_a_question_about_a_long_memory(small: ServerProcess) -> None:
    """The memory is twice the pool. The question reads no more of it than the budget, streams nothing, and its own KV
    does not enter the tree."""
    flush(small)
    memory = prose(3900, 21)
    generate(small, memory, 1)
    before = small.get("/lsa/status")
    asked = [generate(small, f"{memory} {prose(150, 22)}", 40, f"asked-{i}", prefill="resident") for i in range(2)]
    after = wait_until_idle(small)
    for number, answer in enumerate(asked):
        entry = finished_request(small, f"asked-{number}")
        assert entry["prefill"] == "resident"
        assert len(entry["history"][0]) <= max(8, entry["context_pages"] * 0.135)
        assert answer["meta_info"]["cached_tokens"] <= 4096, "the first question is not in the tree"
    assert after["prefill"]["resident_prompts"] == before["prefill"]["resident_prompts"] + 2
    assert after["prefill"]["streamed_passes"] == before["prefill"]["streamed_passes"]
    assert after["virtual"]["allocated"] == before["virtual"]["allocated"]


@pytest.mark.slow
def test_a_needle_is_found_either_way(whole: ServerProcess) -> None:
    """With the whole model: the question is read over a resident set that its own queries chose."""
    for depth in (0.3, 0.7):
        sample = needle(3000, depth, 31 + int(10 * depth))
        text, question = sample.prompt.rsplit("\n", 1)
        generate(whole, text, 1)
        for mode in ("exact", "resident"):
            rid = f"{mode}-{depth}"
            assert sample.answer in generate(whole, f"{text}\n{question}\nAnswer:", 30, rid, prefill=mode)["text"], rid
        assert finished_request(whole, rid)["prefill"] == "resident"


def test_heat_brings_the_pages_of_a_memory_back_before_they_are_asked_for(small: ServerProcess) -> None:
    """Others push the memory off the device; the next question warms what the last one selected."""
    flush(small)
    memory = prose(3900, 23)
    generate(small, f"{memory} {prose(100, 24)}", 40)
    for seed in (25, 26):
        generate(small, prose(1800, seed), 2, enabled=False)
    before = small.get("/lsa/status")["recalls"]["warmed_pages"]
    generate(small, f"{memory} {prose(100, 27)}", 10)
    assert small.get("/lsa/status")["recalls"]["warmed_pages"] > before


def test_short_prefixes_are_read_whole(small: ServerProcess) -> None:
    """Below ``min_context`` there is nothing to gain."""
    flush(small)
    memory = prose(400, 28)
    generate(small, memory, 1)
    generate(small, f"{memory} {prose(100, 29)}", 4, "short", prefill="resident")
    seen = finished_request(small, "short")
    assert seen["prefill"] == "in place"
