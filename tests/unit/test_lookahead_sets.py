"""Resident sets that fit in part, that a request names itself, and that shrink under pressure."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
from lookahead_server import LAG, LEAD, LONG, SERVERS, WINDOW, Server, given_sets, reads, two_requests

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.grouping import Company
from sglang_lsa.engine.request import Request, State

# --- a set that fits in part -----------------------------------------------------------------------------------------


def crowded(room: int, **options: object) -> tuple[Server, Request]:
    """Request ``a`` reads 0, 1, 2, 3 and 11; in its next window it wants 5, 6 and 7 as well, best first, which have
    left the device. ``room`` device pages can be had then, beside the one that it is left to grow into."""
    server = Server(**options)
    server.wanted.positions = [1, 2, 3]
    request = server.prefill("a", 12 * PAGE_SIZE)
    assert server.read(request) == [0, 1, 2, 3, 11]
    server.push_off()
    server.wanted.positions = []
    server.wanted.values = {5: 3.0, 6: 2.0, 7: 1.0, 3: 0.5, 1: 0.4}
    server.decode(request)  # opens a page
    server.leave(1 + room)
    return server, request


@pytest.mark.parametrize(
    ("room", "positions"),
    [
        # Always 0; then as many of 5, 6 and 7 as there is room for, and as many of the old ones as that leaves.
        pytest.param(3, [0, 5, 6, 7, 3], id="all fit"),
        pytest.param(2, [0, 5, 6, 3, 1], id="two fit"),
        pytest.param(1, [0, 5, 3, 1, 2], id="one fits"),
    ],
)
def test_a_set_that_fits_in_part_keeps_the_best_of_the_old_one(room: int, positions: list[int]) -> None:
    server, request = crowded(room)
    for _ in range(WINDOW - 1):
        server.decode(request)
    assert server.read(request) == request.resident.positions.tolist() == sorted(positions)
    assert server.held_positions(request) == [*sorted(positions), 12]
    assert (request.story.shrunk, server.lookahead.counts.shrunk) == (int(room < 3),) * 2
    assert (request.story.stalls, server.lookahead.counts.stalls, request.window) == (0, 0, 1)
    assert request.story.history[-1] == sorted(positions)
    assert request.resident.ranks is not None
    ranks = dict(zip(request.resident.positions.tolist(), request.resident.ranks.tolist(), strict=True))
    worth = {0: float("inf"), 5: 3.0, 6: 2.0, 7: 1.0, 3: 0.5, 1: 0.4, 2: 0.0}
    assert ranks == {position: worth[position] for position in positions}
    server.pager.ledger.check()


def test_a_set_of_which_nothing_new_fits_is_a_stall() -> None:
    server, request = crowded(0)
    old, held = server.read(request), server.held_positions(request)
    for _ in range(WINDOW - 1):
        server.decode(request)
    assert (server.read(request), server.held_positions(request)) == (old, held)
    assert (
        request.story.shrunk,
        request.story.stalls,
        server.lookahead.counts.shrunk,
        server.lookahead.counts.stalls,
    ) == (
        0,
        1,
        0,
        1,
    )


@pytest.mark.parametrize(("min_pages", "positions"), [(4, [0, 5, 11]), (5, None)], ids=["enough", "too few"])
def test_a_set_that_would_be_smaller_than_min_pages_is_a_stall(min_pages: int, positions: list[int] | None) -> None:
    """The growing page counts. The old set was smaller because nothing else scored above the threshold."""
    server = Server(min_pages=min_pages)
    request = server.prefill("a", 12 * PAGE_SIZE)
    assert server.read(request) == [0, 11]
    server.push_off()
    server.decode(request)
    server.leave(1 + 1)
    server.wanted.values = {5: 3.0, 6: 2.0, 7: 1.0}
    for _ in range(WINDOW - 1):
        server.decode(request)
    assert server.read(request) == (positions or [0, 11])
    assert (request.story.shrunk, request.story.stalls) == ((1, 0) if positions else (0, 1))


# --- sets that a request names itself --------------------------------------------------------------------------------


GIVEN = [
    # After a prompt of 640 tokens.
    pytest.param("641:10:0,3,9", id="from the first step"),
    pytest.param("644:10:1", id="dense at first"),
    pytest.param("641:10:", id="only the tail"),
    pytest.param("641:10:0,3;642:10:1,4;643:10:2,5", id="every step"),
    pytest.param("641:10:0,3,9;660:10:2;690:10:4,5,6", id="windows of other lengths"),
    pytest.param("643:4:1,3", id="a long tail"),
    pytest.param("641:0:;650:10:7", id="dense, pruned"),
    pytest.param("641:10:7;650:0:", id="pruned, dense"),
    pytest.param("645:10:7,8;655:0:;665:9:1", id="dense, pruned, dense, pruned"),
    pytest.param("705:11:0,10;720:11:3,10", id="with pages that decode filled"),
]


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("text", GIVEN)
def test_given_sets_are_read_at_the_tokens_that_they_name(text: str, server: tuple[int, int, int]) -> None:
    lead, lag, window = server
    sets = given_sets(text)
    expected: dict[int, tuple[int, list[int]]] = {}
    for tokens in range(641, 731):
        begun = [given for given in sets if given.tokens <= tokens]
        expected[tokens] = (begun[-1].tail_start, list(begun[-1].positions)) if begun else (0, [])
    running = Server(lead, lag, window=window)
    request = running.prefill("a", 640, sets=sets)
    running.push_off()
    assert reads(running, request, 90) == expected
    assert running.wanted.calls == running.lookahead.counts.stalls == running.lookahead.counts.failures == 0
    assert [window.as_given() for window in request.story.windows] == list(sets)
    assert not running.lookahead.refresher.on_their_way


def test_after_the_last_given_set_nothing_changes() -> None:
    server = Server()
    request = server.prefill("a", 640, sets=given_sets("641:10:3"))
    for _ in range(20 * WINDOW):
        server.decode(request)
    assert (server.lookahead.counts.refreshes, server.wanted.calls, request.window) == (1, 0, 0)
    assert server.read(request) == [3]


def test_a_given_set_that_does_not_fit_is_a_stall() -> None:
    server = Server()
    request = server.prefill("a", 640, sets=given_sets("641:10:0,3;645:10:1,2;649:10:4"))
    server.push_off()
    server.decode(request)
    server.leave(2)
    seen = reads(server, request, 10)
    assert [seen[tokens][1] for tokens in (642, 645, 648, 649, 651)] == [[0, 3], [0, 3], [0, 3], [4], [4]]
    assert (request.story.stalls, request.story.shrunk) == (1, 0)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("tokens", [10 * PAGE_SIZE, 10 * PAGE_SIZE + 7, 4 * PAGE_SIZE - 30], ids=str)
def test_the_windows_of_a_request_can_be_replayed(tokens: int, server: tuple[int, int, int]) -> None:
    """By another server, with what ``/lsa/status`` shows; with windows that shrank, and that were dense at first."""
    lead, lag, window = server
    steps = 6 * window + 40
    first = Server(lead, lag, window=window, budget=0.9 if tokens < 256 else 0.5)
    request = first.prefill("a", tokens, seed=1)
    seen = {}
    for _ in range(steps):
        first.wanted.positions = [1 + (3 * request.window + place) % 9 for place in range(3)]
        seen |= reads(first, request, 1)
        if len(request.resident.positions) >= 3 and not first.lookahead.counts.shrunk:
            first.lookahead.shrink([request], 1)
    windows = [window for window in request.story.windows if window.tokens]
    assert len({tuple(window.positions) for window in windows}) >= 3
    assert first.lookahead.counts.shrunk == 1

    text = ";".join(str(window.as_given()) for window in windows)
    second = Server(lead, lag, window=window)
    again = second.prefill("a", tokens, sets=given_sets(text))
    assert reads(second, again, steps) == seen
    assert [window.as_given() for window in again.story.windows] == [window.as_given() for window in windows]
    assert second.wanted.calls == 0


# --- smaller sets under pressure -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "large_set", "small_set"),
    [
        pytest.param(0, [0, 2, 4, 6, 8, 11], [0, 1, 2, 7], id="nothing is wanted"),
        pytest.param(1, [0, 2, 11], [0, 1, 2, 7], id="the largest, by half"),
        pytest.param(3, [0, 2, 11], [0, 1, 2, 7], id="just enough"),
        pytest.param(4, [0, 2, 11], [0, 7], id="both"),
        pytest.param(99, [0, 2, 11], [0, 7], id="each once"),
    ],
)
def test_the_largest_sets_are_halved_first(wanted: int, large_set: list[int], small_set: list[int]) -> None:
    server, large, small = two_requests()
    obtainable = server.pager.unpromised_pages
    server.lookahead.shrink([small, large], wanted)
    for request, positions, before in ((large, large_set, 6), (small, small_set, 4)):
        assert server.read(request) == request.resident.positions.tolist() == positions
        assert server.held_positions(request) == positions
        assert request.story.history[-1] == positions
        assert len(request.story.history) == 1, "no step has read the larger one"
        assert request.story.shrunk == int(len(positions) < before)
        assert int(server.table.shortening[request.row]) == (request.resident.tail_start - len(positions)) * PAGE_SIZE
    freed = 10 - len(large_set) - len(small_set)
    assert server.pager.unpromised_pages == obtainable + freed
    assert server.lookahead.counts.shrunk == large.story.shrunk + small.story.shrunk
    server.pager.ledger.check()


def test_a_set_can_shrink_again_and_grows_with_the_next_window() -> None:
    server, large, _ = two_requests()
    server.decode(large)  # opens a page
    sizes = []
    for _ in range(4):
        server.lookahead.shrink([large], 1)
        sizes.append(len(large.resident.positions))
    assert sizes == [3, 2, 2, 2], "both ends stay"
    assert large.story.history == [[0, 2, 4, 6, 8, 11], [0, 11]], "what was read, and what will be"
    server.wanted.values = {2: 5.0, 4: 4.0, 6: 3.0, 8: 2.0}
    for _ in range(WINDOW - 1):
        server.decode(large)
    assert server.read(large) == [0, 2, 4, 6, 8]
    assert (large.story.stalls, large.story.shrunk) == (0, 2)


@pytest.mark.parametrize(
    ("min_pages", "tail", "size"),
    [(1, 0, 3), (4, 0, 4), (4, 1, 3), (5, 1, 4), (6, 0, 6), (6, 2, 4), (12, 0, 6)],
)
def test_no_set_shrinks_below_min_pages(min_pages: int, tail: int, size: int) -> None:
    server = Server(budget=0.5, min_pages=1)
    server.wanted.values = {2: 5.0, 4: 4.0, 6: 3.0, 8: 2.0}
    request = server.prefill("a", 12 * PAGE_SIZE)
    request.tokens += tail * PAGE_SIZE
    request.pages = np.append(request.pages, server.allocate(tail))
    object.__setattr__(server.config, "min_pages", min_pages)
    server.lookahead.shrink([request], 1)
    assert len(request.resident.positions) == size
    assert request.story.shrunk == int(size < 6)


def test_sink_and_recent_pages_never_shrink_away() -> None:
    server = Server(sink_pages=3, recent_pages=2, budget=0.75)
    server.wanted.values = {position: 1.0 + position for position in range(12)}
    request = server.prefill("a", 12 * PAGE_SIZE)
    assert server.read(request) == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    for _ in range(3):
        server.lookahead.shrink([request], 9)
    assert server.read(request) == [0, 1, 2, 10, 11]
    assert request.story.shrunk == 1


@pytest.mark.parametrize("kind", ["dense", "short", "given"])
def test_sets_that_were_not_predicted_do_not_shrink(kind: str) -> None:
    server = Server()
    sets = given_sets("641:10:0,3,4,9") if kind == "given" else ()
    request = server.prefill("a", 640 if kind != "short" else 100, dense=kind == "dense", sets=sets)
    held, read = server.held_positions(request), server.read(request)
    server.lookahead.shrink([request], 9)
    assert (server.held_positions(request), server.read(request)) == (held, read)
    assert (request.story.shrunk, server.lookahead.counts.shrunk, server.lookahead.counts.failures) == (0, 0, 0)


@pytest.mark.parametrize(("lead", "lag"), [(0, 0), (LEAD, LAG)], ids=["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["dense steps", "given later"])
def test_a_request_that_still_reads_everything_gets_its_first_set_under_pressure(
    kind: str, lead: int, lag: int
) -> None:
    """Before it is failed for want of a page."""
    server = Server(lead, lag, window=LONG)
    server.wanted.values = {2: 5.0, 4: 4.0}
    steps, sets = (1000, ()) if kind == "dense steps" else (0, given_sets("1000:14:0,3"))
    request = server.prefill("a", 12 * PAGE_SIZE, dense_steps=steps, sets=sets)
    server.decode(request)
    assert request.resident.tail_start == 0
    server.lookahead.shrink([request], 1)
    assert server.read(request) == [0, 2, 4]
    assert server.held_positions(request) == [0, 2, 4, 12]
    assert (request.story.shrunk, server.lookahead.counts.failures, server.lookahead.counts.stalls) == (1, 0, 0)
    for _ in range(12 * PAGE_SIZE + 1, 1000 if sets else 12 * PAGE_SIZE + 2 * LONG):
        server.decode(request)
    assert request.window >= 1, "its own set at its time, or the next prediction"
    if sets:
        assert request.resident.positions.tolist() == [0, 3]


@pytest.mark.parametrize("first", [True, False], ids=["first set on its way", "prompt not done"])
def test_pressure_completes_a_first_set_and_leaves_prompts_alone(first: bool) -> None:
    server = Server(LEAD, LAG, window=LONG)
    server.wanted.values = {2: 5.0, 4: 4.0}
    request = server.prefill("a", 12 * PAGE_SIZE)
    assert request.resident.next is not None and request.resident.next.state is State.QUEUED
    if not first:
        request.tokens += 1
    server.lookahead.shrink([request], 1)
    assert (request.resident.tail_start, request.story.shrunk) == ((12, 1) if first else (0, 0))


@pytest.mark.parametrize(("lead", "lag"), [(0, 0), (LEAD, LAG)], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        pytest.param(13, ["abcd"], id="all"),
        pytest.param(9, ["abc"], id="some"),
        pytest.param(4, ["a", "b"], id="one that let go of less than all"),
    ],
)
def test_groups_are_formed_once_for_all_that_must_be_pruned(
    wanted: int, chosen: list[str], lead: int, lag: int
) -> None:
    """Not once for each of them. Nobody chooses who need not."""
    server, choosing = Server(lead, lag, window=LONG), []
    requests = [server.prefill(rid, 4 * PAGE_SIZE, dense_steps=1000) for rid in "abcd"]

    def company(choosers: Sequence[Request]) -> Company:
        choosing.append("".join(request.rid for request in choosers))
        return Company(choosers, requests, PAGE_SIZE)

    server.lookahead.refresher.chooser.company = company
    for request in requests:
        server.decode(request)
    server.lookahead.shrink(requests, wanted)
    assert choosing == chosen, "each lets go of three of its four pages"
    pruned = "".join(chosen)
    assert [server.held_positions(one) == [0, 4] for one in requests] == [one.rid in pruned for one in requests]
    assert [one.story.shrunk for one in requests] == [one.rid in pruned for one in requests]
    assert [one.resident.next for one in requests] == [None] * 4
    server.pager.ledger.check()


def test_pages_that_stay_are_told_from_pages_without_a_score() -> None:
    """A page kept in place of one that did not fit may have no score; it is the first to go, not one that stays."""
    server, large, _ = two_requests()
    large.resident.ranks = np.array([np.inf, -np.inf, -np.inf, -np.inf, -np.inf, np.inf])
    server.lookahead.shrink([large], 9)
    assert server.read(large) == [0, 2, 11]


def test_pages_that_another_request_reads_are_not_counted_as_let_go() -> None:
    server, large, small = two_requests()
    assert server.pager.hold("reader", large.pages[[4, 6, 8]])
    server.lookahead.shrink([large, small], 1)
    assert server.read(large) == [0, 2, 11]
    assert server.read(small) == [0, 7], "nothing was let go before"
    assert server.pager.ledger.held_by("reader") == set(large.pages[[4, 6, 8]].tolist())


def test_a_set_that_cannot_shrink_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, large, small = two_requests()
    remap = server.table.remap

    def broken(row: int, physical: np.ndarray, tail_start: int) -> None:
        if row == large.row:
            raise RuntimeError("no such row")
        remap(row, physical, tail_start)

    monkeypatch.setattr(server.table, "remap", broken)
    with caplog.at_level(logging.ERROR, logger="sglang_lsa"):
        server.lookahead.shrink([large, small], 1)
    assert "shrinking the set of large failed; it keeps the pages that it has" in caplog.text
    assert server.lookahead.counts.failures == 1
    assert (
        server.read(large) == large.resident.positions.tolist() == server.held_positions(large) == [0, 2, 4, 6, 8, 11]
    )
    assert (large.story.shrunk, large.story.history) == (0, [[0, 2, 4, 6, 8, 11]])
    assert server.read(small) == [0, 7], "the others still shrink"
    server.pager.ledger.check()
