"""Prefill in place, and what goes wrong with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import NONE
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_server import CHUNK, PHYSICAL, Read, Server
from promises import owed

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.prefill import DevicePoolFull
from sglang_lsa.engine.reading import IN_PLACE, RESIDENT, STREAMED
from sglang_lsa.memory.pages import pages_complete, pages_spanned
from sglang_lsa.patches.batch import batch_of
from sglang_lsa.patches.requests import judge, key_of, request_gone
from sglang_lsa.serve.one_request import collect, formatted

# --- in place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, PAGE_SIZE, 5 * PAGE_SIZE - 1, 5 * PAGE_SIZE, 5 * PAGE_SIZE + 1])
def test_a_prompt_in_place(tokens: int) -> None:
    server = Server(budget=1.0)
    req = server.request(tokens)
    assert server.admit(req) == [IN_PLACE]
    assert server.extend(req) == [Read([])]
    assert server.held(req) == list(range(pages_spanned(tokens, PAGE_SIZE)))
    assert owed(server.pager) == {}, "what was promised is held"
    assert server.step.readings is None, "backends read everything"
    assert server.ledger.host_pages == pages_complete(tokens, PAGE_SIZE)
    request = server.runtime.requests["a"]
    assert (request.tokens, request.prompt_tokens, request.story.prefill) == (tokens, tokens, IN_PLACE)
    assert (server.prefill.prompt_tokens, server.prefill.radix_hit_tokens) == (tokens, 0)


def test_a_prompt_in_place_brings_in_its_prefix() -> None:
    server = Server(budget=1.0)
    prefix = server.memory(8)
    server.push_off()
    req = server.request(10 * PAGE_SIZE, prefix)
    server.admit(req)
    (read,) = server.extend(req)
    assert read == Read(server.slots(req, 0, 8 * PAGE_SIZE))
    assert server.held(req) == list(range(10))
    assert server.ledger.recalls == 8
    assert (server.prefill.prompt_tokens, server.prefill.radix_hit_tokens) == (10 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert server.prefill.streamed_passes == 0


def test_a_pass_does_not_wait_for_all_layers_of_what_it_brings_in() -> None:
    server = Server(budget=1.0)
    prefix = server.memory(8)
    server.push_off()
    gpu = server.late()
    req = server.request(10 * PAGE_SIZE, prefix)
    server.admit(req)
    (read,) = server.extend(req)
    assert read.here == server.slots(req, 0, 8 * PAGE_SIZE)
    assert (gpu.calls["gate_layers"], gpu.calls["wait"]) == (1, 0)
    assert [recall.layered for recall in gpu.recalls] == [True]


def test_a_prompt_in_place_in_chunks() -> None:
    """What it still needs stays promised to it, so that nothing overtakes it."""
    server = Server(budget=1.0)
    req = server.request(11 * PAGE_SIZE)
    assert server.admit(req) == [IN_PLACE]
    assert owed(server.pager) == {"a": 11}
    for end, promised in ((4 * PAGE_SIZE, 7), (7 * PAGE_SIZE + 20, 3), (9 * PAGE_SIZE, 2)):
        begun = req.computed
        (read,) = server.extend(req, a=end)
        assert read == Read(server.slots(req, 0, begun))
        assert server.held(req) == list(range(pages_spanned(end, PAGE_SIZE)))
        assert owed(server.pager) == {"a": promised}
        assert server.lookahead.counts.refreshes == 0
    server.extend(req)
    assert server.held(req) == list(range(11))
    assert owed(server.pager) == {}
    assert server.lookahead.counts.refreshes == 1
    assert server.prefill.prompt_tokens == 11 * PAGE_SIZE, "counted once"


def test_prompts_of_one_pass_get_their_pages_in_their_order() -> None:
    server = Server(budget=1.0)
    memory = server.memory(3)
    first = server.request(5 * PAGE_SIZE - 7, memory, "first", 1)
    second = server.request(2 * PAGE_SIZE, NONE, "second", 2)
    third = server.request(6 * PAGE_SIZE, memory, "third", 3)
    assert server.admit(first, second, third) == [IN_PLACE] * 3
    reads = server.extend(first, second, third, third=5 * PAGE_SIZE)
    assert [len(read.here) // PAGE_SIZE for read in reads] == [3, 0, 3]
    for req, count in ((first, 5), (second, 2), (third, 5)):
        pages = server.runtime.requests[req.rid].pages
        assert len(pages) == count
        assert pages.tolist() == [slot // PAGE_SIZE for slot in server.slots(req, 0, req.computed)[::PAGE_SIZE]]
        assert server.held(req) == list(range(count))
    assert [request.rid for request in server.step.requests] == ["first", "second", "third"]
    assert owed(server.pager) == {"third": 1}


def test_a_request_reads_all_of_its_pages_until_it_has_a_set() -> None:
    """Its row of the table may still be that of the request before it."""
    server = Server(budget=1.0)
    server.lookahead.sets.table.remap(1, np.array([3, 4]), 5)
    req = server.request(3 * PAGE_SIZE)
    server.admit(req)
    server.extend(req)
    assert (int(server.lookahead.sets.table.count[1]), int(server.lookahead.sets.table.tail_start[1])) == (0, 0)


# --- a rid that is used again ----------------------------------------------------------------------------------------


def test_a_rid_is_used_again_while_its_first_request_is_still_here() -> None:
    """A client hung up and asks again: SGLang's HTTP process has forgotten the first, its scheduler has not."""
    server = Server(budget=1.0)
    first, second = server.request(5 * PAGE_SIZE, row=1), server.request(6 * PAGE_SIZE, row=2)
    for req in (first, second):
        assert server.admit(req) == [IN_PLACE]
        server.extend(req)
    keys = [key_of(first), key_of(second)]
    assert keys == ["a", "a (2)"]
    assert [server.runtime.requests[key].rid for key in keys] == ["a", "a"]
    for _ in range(3):
        for req in (first, second):
            assert sorted(server.decode(req)) == server.slots(req, 0, req.computed)
    request_gone(server.runtime, first)
    assert list(server.runtime.requests) == server.ledger.holders() == ["a (2)"]
    assert sorted(server.decode(second)) == server.slots(second, 0, second.computed)
    third = server.request(2 * PAGE_SIZE, row=3)
    server.admit(third)
    assert key_of(third) == "a"
    request_gone(server.runtime, server.request(PAGE_SIZE, row=4))  # aborted before it was admitted
    assert sorted(server.runtime.admission.admitted) == ["a", "a (2)"]
    server.runtime.check()


# --- what is remembered ----------------------------------------------------------------------------------------------


def told(server: Server) -> dict[str, Any]:
    """What is told of the request that finished last."""
    rid = server.runtime.finished[-1].summary["rid"]
    return formatted(collect(server.runtime, rid))["finished"][-1]


def test_the_sets_of_a_finished_request_can_be_given_to_another() -> None:
    """To a streamed prompt, by another server; it reads the same pages and needs no scores."""
    first = Server()
    first.wanted.values = {30: 2.0, 45: 1.0}
    seen = []
    for server, lsa in ((first, {}), (Server(), {"sets": ""})):
        if "sets" in lsa:
            lsa = {"sets": told(first)["sets"]}
            server.wanted.score = lambda *_: pytest.fail("scored")  # type: ignore[method-assign]
        req = server.request(50 * PAGE_SIZE, **lsa)
        assert server.admit(req) == [STREAMED]
        while req.computed < 50 * PAGE_SIZE:
            server.extend(req, a=min(50 * PAGE_SIZE, req.computed + CHUNK))
        seen.append([server.decode(req) for _ in range(30)])
        request_gone(server.runtime, req)
    assert seen[0] == seen[1]
    done, again = told(first), told(server)
    assert done["sets"] == again["sets"] != ""
    assert (done["prefill"], done["prompt_tokens"], done["number"]) == ("streamed", 50 * PAGE_SIZE, 1)
    assert done["history"][0] == [0, 30, 45, 49]
    assert len(done["history"]) == len(done["sets"].split(";")) >= 4


# --- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "allocated"), [(1, 6), (-1, 4)], ids=["too many", "too few"])
def test_new_pages_that_do_not_fit_the_batch_are_an_error(more: int, allocated: int) -> None:
    server = Server(budget=1.0)
    first, second = server.request(3 * PAGE_SIZE, NONE, "first", 1), server.request(100, NONE, "second", 2)
    server.admit(first, second)
    batch, new_pages = server.batch({}, first, second)
    new_pages = np.append(new_pages, server.allocate(1)) if more > 0 else new_pages[:-1]
    with pytest.raises(RuntimeError, match=f"LSA: SGLang allocated {allocated} pages for a batch that needs 5"):
        server.prefill.begin_pass(batch_of(batch), new_pages)


def test_a_page_that_must_be_on_the_device_and_cannot_be() -> None:
    server = Server()
    server.neighbour(PHYSICAL - 2)
    with pytest.raises(DevicePoolFull) as full:
        server.prefill.hold("a", server.allocate(3))
    assert str(full.value) == (
        "LSA: the device pool (24 pages, 22 held) cannot take 3 pages of a; "
        "admission should have prevented this, please report it"
    )
    assert server.ledger.held_by("a") == frozenset()
    server.ledger.check()


def test_what_is_in_flight_is_waited_for_before_that() -> None:
    server = Server()
    gpu = server.late()
    pages = server.allocate(PHYSICAL)
    assert server.pager.hold("done", pages)
    server.pager.store(pages)
    server.pager.forget("done")
    new = server.allocate(3)
    server.prefill.hold("a", new)
    assert server.ledger.held_by("a") == set(new.tolist())
    assert gpu.calls["wait"] == 1
    server.prefill.hold("a", server.allocate(1))
    assert gpu.calls["wait"] == 1


# --- any prompt ------------------------------------------------------------------------------------------------------


@settings(derandomize=True, database=None, deadline=None, max_examples=120)
@given(
    page=st.sampled_from([16, 64, 256]),
    physical=st.integers(4, 30),
    chunk_pages=st.none() | st.integers(1, 20),
    pages=st.floats(0, 70),
    cached=st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0]),
    budget=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    prefill=st.sampled_from(["exact", "resident"]),
    steps=st.integers(1, 3),
)
def test_an_idle_server_prefills_whatever_it_does_not_refuse(
    page: int,
    physical: int,
    chunk_pages: int | None,
    pages: float,
    cached: float,
    budget: float,
    prefill: str,
    steps: int,
) -> None:
    """To the end, and decodes; exact prompts read every token before each pass once, whatever is where."""
    chunk, tokens = chunk_pages and chunk_pages * page, max(1, int(pages * page))
    min_context = min(256, physical * page // 2)
    server = Server(chunk, physical, page, budget=budget, prefill=prefill, min_context=min_context, min_pages=4)
    server.wanted.values = {3 * position: 1.0 + position for position in range(10)}
    memory = server.memory(int((tokens - 1) // page * cached))
    req = server.request(tokens, memory)
    if judge(server.admission, req) is not None:
        return
    (how,) = server.admit(req)
    while req.computed < tokens:
        most = min(chunk or tokens, server.admission.admitted[key_of(req)].chunk_tokens or tokens)
        begun = req.computed
        (read,) = server.extend(req, a=min(tokens, begun + most))
        if how != RESIDENT:
            assert sorted(read.here + read.streamed) == server.slots(req, 0, begun)
        else:
            assert not read.streamed
            assert set(read.here) >= set(server.slots(req, len(memory) * page, begun))
            assert len(read.here) < begun
    assert owed(server.pager) == {}
    for _ in range(steps):
        found = server.decode(req)
        assert len(set(found)) == len(found)
        assert set(found) <= set(server.slots(req, 0, req.computed))
    assert server.lookahead.counts.failures == 0
