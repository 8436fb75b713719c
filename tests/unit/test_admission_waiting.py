"""Admission: what waits for device pages, what is promised to it, and what decode may still take."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from admission_server import PHYSICAL, Server, how
from harness import request
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import owed

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.reading import IN_PLACE, RESIDENT, STREAMED
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.patches.requests import judge, key_of, options_of, promise, request_gone


def forget(server: Server, req: Any) -> None:
    """As when its KV is released."""
    runtime: Any = SimpleNamespace(request_gone=lambda key, complete: server.admission.forget(key))
    request_gone(runtime, req)


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [20, 60])
def test_what_is_promised_cannot_be_had_by_others(pages: int) -> None:
    server = Server()
    first = request(pages * PAGE_SIZE, rid="first")
    admitted = server.choose(first)
    assert admitted is not None
    promise(server.admission, first, admitted)
    assert owed(server.pager) == {"first": admitted.demand}
    assert server.admission.admitted[key_of(first)] is admitted
    assert server.pager.unpromised_pages == PHYSICAL - admitted.demand
    room = PHYSICAL - admitted.demand - 1 - 1
    second = request(room * PAGE_SIZE, rid="second")
    assert how(server.choose(second, 1)) == (IN_PLACE, room, None)
    assert server.choose(request((room + 1) * PAGE_SIZE, rid="second", enabled=False), 1) is None

    forget(server, first)
    server.pager.forget("first")
    assert server.admission.admitted == {}
    assert server.choose(request((room + 1) * PAGE_SIZE, rid="second", enabled=False), 1) is not None


def test_pages_in_flight_count_as_if_they_were_there() -> None:
    """Else it would depend on how fast the device is who is admitted, and how."""
    server = Server()
    gpu = server.late()
    held = server.hold("earlier", 20)
    number = server.pager.ledger.forward_started()
    server.pager.store(held[:10])
    server.pager.forget("earlier")
    server.pager.ledger.release(held[10:])
    assert server.pager.unpromised_pages == 4
    assert how(server.choose(request(23 * PAGE_SIZE))) == (IN_PLACE, 23, None)
    assert (gpu.calls["notice"], gpu.calls["wait"]) == (1, 0), "it takes notice, but does not wait"
    server.pager.ledger.forward_finished(number)


# --- waiting ---------------------------------------------------------------------------------------------------------


def select(server: Server, *pages: int) -> None:
    """Resident sets of earlier requests: the last page is the hottest."""
    for page in pages:
        server.pager.ledger.heat.select(np.array([page]))


def on_device(server: Server, pages: np.ndarray) -> list[int]:
    return pages[server.pager.ledger.on_device(pages)].tolist()


def test_a_waiting_prompt_brings_in_the_hot_pages_of_its_prefix_once() -> None:
    server = Server()
    prefix = server.memory_in_the_mirror_only(20)
    select(server, *prefix[[4, 9, 2, 15, 11]])
    server.hold("running", 21)
    req = request(22 * PAGE_SIZE, prefix, enabled=False)
    assert server.choose(req) is None
    assert on_device(server, prefix) == prefix[[2, 11, 15]].tolist(), "the hottest that fit"
    assert (server.admission.waits, server.pager.warmed_pages) == (1, 3)
    assert server.pager.ledger.holders() == ["running"], "they are a cache"

    server.hold("running", 1)
    assert on_device(server, prefix) == prefix[[11, 15]].tolist(), "the coldest gave way"
    server.pager.forget("running")
    server.pager.reservations.promise("other", 10)
    assert server.choose(req) is None
    assert on_device(server, prefix) == prefix[[11, 15]].tolist()
    assert (server.admission.waits, server.pager.warmed_pages) == (2, 3)


def test_a_request_is_judged_by_what_was_in_force_when_it_arrived() -> None:
    """The HTTP process checks by the configuration at start; one that became impossible since is refused, not an error
    in the scheduler, which still computes a token of what it aborts."""
    server = Server()
    server.lookahead.rules.config = dataclasses.replace(server.config, policy="full")
    req = request(5 * PAGE_SIZE, sets="321:4:0,2")
    reason = judge(server.admission, req)
    assert reason is not None and "names sets and switches pruning off" in reason
    req.origin_input_ids = req.full_untruncated_fill_ids = [0]
    admitted = server.choose(req)
    assert admitted is not None and admitted.how == IN_PLACE
    assert options_of(server.admission, req).sets == ()


def test_options_that_did_not_come_through_http_are_refused_as_a_request() -> None:
    server = Server()
    req = request(100, budget="much")
    assert options_of(server.admission, req).budget == server.config.budget, (
        "SGLang aborted it before it was asked about"
    )
    assert server.choose(req) is not None
    assert "custom_params.lsa.budget is 'much'" in str(judge(server.admission, request(100, budget="much")))


def test_hot_pages_do_not_take_what_is_promised() -> None:
    server = Server()
    prefix = server.memory_in_the_mirror_only(20)
    select(server, *prefix)
    server.pager.reservations.promise("other", 20)
    assert server.choose(request(22 * PAGE_SIZE, prefix)) is None
    assert on_device(server, prefix) == prefix[[16, 17, 18, 19]].tolist()


def test_hot_pages_take_no_more_than_a_set() -> None:
    server = Server()
    prefix = server.memory_in_the_mirror_only(20)
    select(server, *prefix)
    server.pager.reservations.promise("other", 10)
    assert server.choose(request(22 * PAGE_SIZE, prefix, budget=1.0)) is None
    assert on_device(server, prefix) == prefix[-PHYSICAL // 2 :].tolist()


@pytest.mark.parametrize(
    ("lsa", "warmed"),
    [({}, True), ({"prefill": "resident"}, True), ({"budget": 1.0}, False)],
    ids=["streamed", "resident", "in place"],
)
def test_what_is_not_read_in_place_is_warmed_when_it_is_admitted(lsa: dict[str, object], warmed: bool) -> None:
    """A prompt in place brings in all of its prefix anyway."""
    server = Server()
    prefix = server.memory_in_the_mirror_only(22 if lsa.get("budget") else 40)
    select(server, *prefix[[3, 5]])
    req = request((len(prefix) + 1) * PAGE_SIZE, prefix, **lsa)
    admitted = server.choose(req)
    assert admitted is not None
    assert on_device(server, prefix) == []
    promise(server.admission, req, admitted)
    assert on_device(server, prefix) == (prefix[[3, 5]].tolist() if warmed else [])
    assert server.pager.warmed_pages == 2 * warmed


def test_a_request_that_is_gone_may_warm_again() -> None:
    """It was retracted, and comes back."""
    server = Server()
    prefix = server.memory_in_the_mirror_only(20)
    server.hold("running", 20)
    req = request(22 * PAGE_SIZE, prefix, enabled=False)
    assert server.choose(req) is None
    select(server, prefix[7])
    assert server.choose(req) is None
    assert server.pager.warmed_pages == 0, "once"
    forget(server, req)
    assert server.choose(req) is None
    assert on_device(server, prefix) == [prefix[7]]


# --- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("committed", "free", "can"),
    [
        pytest.param([], 0, True, id="nobody"),
        pytest.param([1, 63, 65, 127], 0, True, id="nobody opens a page"),
        pytest.param([64], 0, False, id="one, no page"),
        pytest.param([64], 1, True, id="one"),
        pytest.param([64, 100, 128, 640], 3, True, id="three"),
        pytest.param([64, 100, 128, 640], 2, False, id="three, two pages"),
    ],
)
def test_every_request_that_opens_a_page_needs_one(committed: list[int], free: int, can: bool) -> None:
    server = Server()
    server.hold("running", PHYSICAL - free)
    asked: list[int] = []
    assert server.admission.can_decode(committed, asked.append) is can
    missing = sum(tokens % PAGE_SIZE == 0 for tokens in committed) - free
    assert asked == ([] if can else [missing])
    assert server.admission.pressed == int(not can)


def test_what_is_promised_is_not_decoded_into() -> None:
    server = Server()
    server.hold("running", PHYSICAL - 3)
    server.pager.reservations.promise("prompt", 2)
    assert server.admission.can_decode([64], pytest.fail)
    assert not server.admission.can_decode([64, 64], lambda pages: None)


def test_unheld_pages_are_given_up_before_anything_is_waited_for() -> None:
    server = Server()
    server.hold("running", PHYSICAL - 2)
    server.memory(2)
    gpu = server.late()
    assert server.admission.can_decode([64, 64], pytest.fail)
    assert gpu.calls["wait"] == 0


def test_what_is_in_flight_is_waited_for_before_a_set_shrinks() -> None:
    server = Server()
    gpu = server.late()
    pages = server.hold("done", PHYSICAL)
    server.pager.store(pages[:2])
    server.pager.forget("done")
    assert server.pager.unpromised_pages == 0
    assert server.admission.can_decode([64, 128], pytest.fail)
    assert gpu.calls["wait"] == 1
    assert server.admission.pressed == 0


def test_sets_shrink_before_a_request_is_retracted() -> None:
    """They are asked for what is missing; what they let go may still be on its way to the mirror."""
    server = Server()
    gpu = server.late()
    pages = server.hold("running", PHYSICAL - 1)
    asked = []

    def shrink(wanted: int) -> None:
        asked.append((wanted, gpu.calls["wait"]))
        server.pager.store(pages[:2])
        server.pager.ledger.drop("running", pages[:2])

    assert server.admission.can_decode([64, 64, 64], shrink)
    assert asked == [(2, 1)]
    assert gpu.calls["wait"] == 2
    assert server.pager.unpromised_pages == 3
    assert server.admission.pressed == 0


def test_when_all_of_that_is_too_little_a_request_is_retracted() -> None:
    server = Server()
    pages = server.hold("running", PHYSICAL)

    def shrink(wanted: int) -> None:
        server.pager.store(pages[:1])
        server.pager.ledger.drop("running", pages[:1])

    assert not server.admission.can_decode([64, 64], shrink)
    assert server.admission.pressed == 1
    assert server.admission.can_decode([64], pytest.fail), "one less fits"
    assert server.admission.pressed == 1


# --- an idle server --------------------------------------------------------------------------------------------------


@settings(derandomize=True, database=None, deadline=None, max_examples=400)
@given(
    page=st.sampled_from([16, 64, 256]),
    physical=st.integers(4, 40),
    chunk_pages=st.none() | st.floats(0, 50),
    pages=st.floats(0, 120),
    cached=st.floats(0, 1),
    budget=st.sampled_from([0.01, 0.135, 0.5, 0.99, 1.0]),
    min_pages=st.sampled_from([1, 8, 30]),
    min_context=st.sampled_from([0, 100, 4096]),
    prefill=st.sampled_from(["exact", "resident"]),
)
def test_an_idle_server_admits_whatever_it_does_not_refuse(
    page: int,
    physical: int,
    chunk_pages: float | None,
    pages: float,
    cached: float,
    budget: float,
    min_pages: int,
    min_context: int,
    prefill: str,
) -> None:
    """Whatever its length; and what is promised to it fits the pool."""
    chunk = None if chunk_pages is None else max(1, int(chunk_pages * page))
    tokens = max(1, int(pages * page))
    least = min(min_context, physical * page // 2)  # as the runtime has it
    server = Server(chunk, physical, page, budget=budget, min_pages=min_pages, min_context=least, prefill=prefill)
    prefix = server.memory(int((tokens - 1) // page * cached))
    req = request(tokens, prefix, page=page)
    refused = judge(server.admission, req)
    prunable = budget < 1 and tokens >= least
    assert (refused is not None) == ((budget == 1 or chunk is None) and tokens >= (physical - 1) * page)
    if refused is not None:
        return
    admitted = server.choose(req)
    assert admitted is not None
    assert admitted.demand < physical
    assert admitted.how == IN_PLACE or prunable
    if admitted.chunk_tokens is not None:
        assert admitted.chunk_tokens % page == 0 < admitted.chunk_tokens
        assert admitted.chunk_tokens <= physical // 2 * page
        assert admitted.how == RESIDENT or admitted.chunk_tokens < admitted.demand * page
        if chunk is None:  # one pass computes the rest
            assert admitted.chunk_tokens >= tokens - len(prefix) * page or admitted.how == RESIDENT
    if admitted.how == STREAMED:
        assert admitted.demand >= server.lookahead.rules.set_pages(pages_spanned(tokens, page), budget)
    promise(server.admission, req, admitted)
    assert server.pager.unpromised_pages >= 1
