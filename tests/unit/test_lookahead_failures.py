"""What a refresh that fails costs, and a selection that knows when it does not know."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from lookahead_server import LONG, NEW, OLD, STAGES, WINDOW, Overlapped, Server, two_requests

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.choose import choose
from sglang_lsa.memory.ledger import LedgerError

# --- when things go wrong --------------------------------------------------------------------------------------------


def test_a_stall_keeps_the_old_set_for_one_more_window() -> None:
    server = Server()
    server.wanted.positions = [1, 2, 3]
    request = server.prefill("a", 12 * PAGE_SIZE)
    other = server.prefill("b", 17 * PAGE_SIZE, dense=True)
    assert server.pager.unpromised_pages == 24 - len(server.held_positions(request)) - 17
    held = server.pager.ledger.held_by("a")
    assert server.pager.hold("c", server.allocate(server.pager.unpromised_pages - 1))
    old, history = server.read(request), list(request.story.history)

    server.wanted.positions = [5, 6, 7]
    for _ in range(WINDOW):
        server.decode(request)
    assert (request.story.stalls, server.lookahead.counts.stalls, request.window) == (1, 1, 1)
    assert server.read(request) == old == request.resident.positions.tolist()
    assert list(request.story.history) == history
    assert server.pager.ledger.held_by("a") == held | {int(request.pages[12])}
    assert request.resident.tail_start == int(server.table.tail_start[request.row]) == 12
    server.pager.ledger.check()

    server.pager.forget(other.rid)
    for _ in range(WINDOW - 1):
        server.decode(request)
    assert server.read(request) == old
    server.decode(request)
    assert set(server.read(request)) >= {5, 6, 7}
    assert request.story.stalls == 1


@pytest.mark.parametrize("error", [RuntimeError("no keys"), ValueError("odd"), KeyError("missing")])
def test_a_policy_that_fails_leaves_the_most_recent_pages(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.wanted.error = error
    with caplog.at_level(logging.ERROR, logger="sglang_lsa"):
        request = server.prefill("a", 12 * PAGE_SIZE)
    assert request.resident.positions.tolist() == [0, 7, 8, 9, 10, 11]
    assert server.lookahead.counts.fallbacks == 1
    assert "scoring a with wanted failed; its most recent pages stay" in caplog.text
    server.wanted.error = None
    server.wanted.positions = [4]
    for _ in range(WINDOW):
        server.decode(request)
    assert 4 in request.resident.positions
    assert server.lookahead.counts.fallbacks == 1


def test_a_policy_that_does_not_exist_leaves_the_most_recent_pages() -> None:
    server = Server()
    request = server.prefill("a", 12 * PAGE_SIZE, policy="unheard of")
    assert request.resident.positions.tolist() == [0, 7, 8, 9, 10, 11]
    assert server.lookahead.counts.fallbacks == 1


# --- stages that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_keeps_the_old_set_for_one_more_window(
    stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    server.wanted.positions = [1, 2, 3]
    request = server.prefill("a", 12 * PAGE_SIZE)
    server.push_off()
    old, held, table = server.read(request), server.held_positions(request), server.table.table.clone()
    server.wanted.positions = [5, 6, 7]
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, logger="sglang_lsa"):
        STAGES[stage](server, patch)
        for _ in range(WINDOW):
            server.decode(request)
    assert "refreshing a failed; it keeps the pages that it has" in caplog.text
    assert (request.story.failures, server.lookahead.counts.failures, request.window) == (1, 1, 1)
    assert (request.story.stalls, request.resident.next, server.lookahead.refresher.on_their_way) == (0, None, {})
    assert server.read(request) == request.resident.positions.tolist() == old
    assert server.held_positions(request) == [*held, 12]
    assert torch.equal(server.table.table, table)
    assert request.story.history == [old]
    server.pager.ledger.check()

    for _ in range(WINDOW - 1):
        server.decode(request)
        assert server.read(request) == old
    server.decode(request)
    assert server.read(request) == [0, 5, 6, 7]
    assert (request.story.failures, request.window) == (1, 2)
    server.pager.ledger.check()


def test_an_inconsistent_ledger_is_not_a_failed_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a bug, never a consequence of load: nothing goes on over it."""
    server, large, small = two_requests()

    def broken(*arguments: object, **options: object) -> bool:
        raise LedgerError("injected")

    monkeypatch.setattr(server.pager, "hold_if_spare", broken)
    with pytest.raises(LedgerError, match="injected"):
        for _ in range(WINDOW):
            server.decode(large)
    monkeypatch.setattr(server.pager, "retain", broken)
    with pytest.raises(LedgerError, match="injected"):
        server.lookahead.shrink([small], 1)
    assert server.lookahead.counts.failures == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_first_window_that_fails_leaves_the_request_dense(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    server.wanted.positions = [3]
    with monkeypatch.context() as patch:
        STAGES[stage](server, patch)
        request = server.prefill("a", 12 * PAGE_SIZE)
    assert (request.story.failures, request.resident.tail_start, request.story.history) == (1, 0, [])
    assert server.held_positions(request) == list(range(12))
    for _ in range(WINDOW):
        server.decode(request)
    assert server.read(request) == [0, 3]
    assert server.held_positions(request) == [0, 3, 12]


# --- scores that are no numbers --------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_choose_nothing() -> None:
    server = Server()
    nan = float("nan")
    found = choose(server.lookahead.rules, np.array([nan, 2, nan, 3, nan, 1, nan, nan]), 8, 0.5)
    assert found.positions.tolist() == [0, 1, 3, 7]
    assert found.ranks.tolist() == [float("inf"), 2, 3, float("inf")]
    assert not found.collapsed
    found = choose(server.lookahead.rules, np.full(8, nan), 8, 0.5)
    assert (found.positions.tolist(), found.ranks.tolist()) == ([0, 7], [float("inf")] * 2)
    assert found.collapsed


def test_a_set_that_has_room_for_all_keeps_pages_without_a_score_as_the_worst() -> None:
    server = Server(min_pages=8)
    found = choose(server.lookahead.rules, np.array([1.0, float("nan"), 2.0, 3.0]), 4, 0.5)
    assert found.positions.tolist() == [0, 1, 2, 3]
    assert found.ranks.tolist() == [float("inf"), float("-inf"), 2.0, float("inf")]
    assert not found.collapsed


# --- selection that knows when it does not know -----------------------------------------------------------------------


def knowing(**options: object) -> Server:
    """Of 12 pages and a growing one 7 may be kept; the first and the growing one stay anyway."""
    return Server(budget=0.55, **options)


def test_a_set_says_what_it_is_expected_to_cover() -> None:
    server = knowing()
    server.wanted.values = {3: 0.6, 5: 0.4, 6: 0.3, 7: 0.1, 8: 0.4, 9: 0.2}
    request = server.prefill("a", 12 * PAGE_SIZE + 5, policy="trusted")
    assert server.read(request) == [0, 3, 5, 6, 8]
    assert request.story.coverage == pytest.approx(1.7 / 2.0)
    assert (request.story.widened, request.story.collapsed, server.lookahead.counts.widened) == (0, 0, 0)


def test_scores_that_are_not_shares_promise_nothing() -> None:
    server = knowing(fallback_budget=1.0, min_coverage=1.0)
    server.wanted.values = {3: 0.6, 5: 0.4}
    request = server.prefill("a", 12 * PAGE_SIZE + 5)
    assert request.story.coverage is None
    assert server.read(request) == [0, 3, 5]


def test_a_set_that_covers_too_little_is_widened() -> None:
    server = knowing(fallback_budget=0.8, min_coverage=0.95, threshold=0.0)
    server.wanted.values = dict.fromkeys(range(1, 11), 0.1)
    request = server.prefill("a", 12 * PAGE_SIZE + 5, policy="trusted")
    assert len(server.read(request)) + 1 == int(13 * 0.8)
    assert request.story.coverage == pytest.approx(0.8)
    assert (request.story.widened, server.lookahead.counts.widened) == (1, 1)


def test_a_set_that_covers_enough_is_not_widened() -> None:
    server = knowing(fallback_budget=0.8, min_coverage=0.95, threshold=0.0)
    server.wanted.values = {4: 0.9, 5: 0.06, 6: 0.01}
    request = server.prefill("a", 12 * PAGE_SIZE + 5, policy="trusted")
    assert server.read(request) == [0, 4, 5, 6]
    assert (request.story.coverage, request.story.widened) == (1.0, 0)


def test_a_policy_has_its_own_threshold_unless_one_is_configured() -> None:
    for options, kept in (({}, [0, 3]), ({"threshold": 0.1}, [0, 3, 5])):
        server = knowing(**options)
        server.wanted.values = {3: 0.6, 5: 0.2, 6: 0.1}
        assert server.read(server.prefill("a", 12 * PAGE_SIZE + 5, policy="trusted")) == kept


def test_a_collapsed_selection_is_reported_once_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    server = knowing()
    request = server.prefill("a", 12 * PAGE_SIZE + 5, policy="trusted")
    for _ in range(2 * WINDOW):
        server.decode(request)
    assert server.read(request)[0] == 0 and request.window == 2
    assert (request.story.collapsed, server.lookahead.counts.collapsed, request.story.coverage) == (3, 3, 0.0)
    assert caplog.text.count("reads its first and last pages only") == 1


def test_a_trusted_policy_that_fails_promises_nothing() -> None:
    server = knowing()
    server.wanted.error = RuntimeError("no scores")
    request = server.prefill("a", 12 * PAGE_SIZE + 5, policy="trusted")
    assert (request.story.coverage, server.lookahead.counts.fallbacks) == (None, 1)


def test_a_policy_of_which_some_scores_are_no_numbers() -> None:
    server = Server()
    server.wanted.positions = [3, 6]
    server.wanted.values = {3: float("nan"), 8: float("nan")}
    request = server.prefill("a", 12 * PAGE_SIZE)
    assert server.read(request) == [0, 6, 11]
    assert (request.story.failures, server.lookahead.counts.fallbacks) == (0, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_behind_a_forward_pass(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Overlapped()
    a = server.a
    with monkeypatch.context() as patch:
        STAGES[stage](server, patch)
        for step in range(3, LONG + 1):
            server.begin(step)
            server.gpu.arrive()
        server.begin(LONG + 1)
    assert (a.story.failures, server.lookahead.counts.failures, a.window, a.resident.next) == (1, 1, 1, None)
    assert server.read(a) == a.resident.positions.tolist() == OLD
    assert server.held_positions(a) == [*OLD, 12]
    assert (a.story.stalls, a.story.history, server.lookahead.refresher.on_their_way) == (0, [OLD], {})
    server.pager.ledger.check()
    for step in range(LONG + 2, 2 * LONG + 4):
        server.begin(step)
        server.gpu.arrive()
    assert server.read(a) == NEW
    assert server.held_positions(a) == [*NEW, 12]
    assert (a.story.failures, a.story.history) == (1, [OLD, NEW])
