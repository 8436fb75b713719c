"""The window clock: when resident sets change, what is held for them, and what happens when they cannot change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import harness
import numpy as np
import pytest
import torch
from harness import Wanted
from promises import owed

from sglang_lsa.config import PAGE_SIZE, GivenSet, LSAConfig, RequestOptions
from sglang_lsa.engine.choose import choose
from sglang_lsa.engine.chooser import Chooser
from sglang_lsa.engine.grouping import Company
from sglang_lsa.engine.lookahead import Lookahead
from sglang_lsa.engine.policies import Policy, Random, Recency
from sglang_lsa.engine.request import Asked, Refresh, Request, State
from sglang_lsa.engine.selection import Watched
from sglang_lsa.engine.window import Clock
from sglang_lsa.memory.ledger import LedgerError
from sglang_lsa.memory.pages import align_up, pages_complete, pages_spanned
from sglang_lsa.memory.resident_table import ResidentTable

PHYSICAL, VIRTUAL = 24, 160
WINDOW = 4
LONG, LEAD, LAG = 8, 5, 2
"""Decode steps of a window; steps before it at which a refresh starts; steps after which its scores are read."""


class Queued(Wanted):
    """The same, but its scores are computed when the test says so, as those of a GPU are."""

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        self.result = torch.from_numpy(super().score(request, pages))
        self.scores = torch.full_like(self.result, float("nan"))
        return self.scores

    def compute(self) -> None:
        self.scores.copy_(self.result)


class Server(harness.Server):
    """A lookahead over a real pager. Requests own runs of virtual pages."""

    def __init__(self, lead: int = 0, lag: int = 0, page: int = PAGE_SIZE, **options: object) -> None:
        super().__init__(PHYSICAL, VIRTUAL, page)
        defaults = {"budget": 0.5, "min_pages": 1, "window": WINDOW, "sink_pages": 1, "recent_pages": 1}
        defaults["prompt_pages"] = 0
        self.config = LSAConfig(**{**defaults, "min_context": 4 * self.pager.page, **options})
        self.table = ResidentTable(16, 32, self.pager.page)
        self.wanted = Wanted()
        self.queued = Queued()
        policies: dict[str, Policy] = {
            "wanted": self.wanted,
            "trusted": self.wanted,
            "queued": self.queued,
            "recency": Recency(),
            "random": Random(),
        }
        self.lookahead = Lookahead(self.config, self.pager, self.table, policies, lead, lag, {"trusted": 0.25})
        self.requests = 0

    def prefill(
        self,
        rid: str,
        tokens: int,
        *,
        policy: str = "wanted",
        seed: int = 0,
        dense: bool = False,
        sets: Sequence[GivenSet] = (),
        promised: int | None = None,
        dense_steps: int = 0,
        prompt_lookup: int = 0,
        widen: float = 1.0,
        text: Sequence[int] = (),
        watch: tuple[int, ...] = (),
    ) -> Request:
        """
        Args:
            promised: the prompt was streamed: only its last pages are sure to be there, and so many are kept for it.
        """
        self.requests += 1
        asked = Asked(
            policy,
            self.config.budget,
            dense,
            seed,
            dense_steps=dense_steps,
            prompt_lookup=prompt_lookup,
            widen=widen,
            watch=watch,
        )
        request = Request(rid, self.requests, asked, tokens=tokens, prompt_tokens=tokens)
        request.text = lambda known: np.array(text[:known], dtype=np.int64)
        request.name_sets(sets)
        request.pages = self.allocate(pages_spanned(tokens, self.pager.page))
        self.hold(rid, request.pages)
        self.write(self.slots_of(request.pages))
        self.pager.store(request.pages[: pages_complete(tokens, self.pager.page)])
        if promised is not None:
            self.pager.ledger.retain(rid, request.pages[pages_complete(tokens, self.pager.page) :])
            self.pager.reservations.promise(rid, promised)
            self.lookahead.sets.await_first(request)
            self.push_off()
        self.lookahead.begin(request)
        return request

    def decode(self, request: Request) -> None:
        """One token more, without a forward pass; the page that it opens is held, as the runtime does."""
        self.before_decode(request)
        self.after_decode(request)

    def before_decode(self, request: Request) -> None:
        request.tokens += 1
        if request.tokens % self.pager.page == 1:
            request.pages = np.append(request.pages, self.allocate(1))
            self.hold(request.rid, request.pages[-1:])
            self.write(self.slots_of(request.pages[-1:]))
        self.lookahead.begin_step()

    def after_decode(self, request: Request) -> None:
        if request.tokens % self.pager.page == 0:
            self.pager.store(request.pages[-1:])
        self.lookahead.refresh(self.lookahead.end_step([request]))

    def read(self, request: Request) -> list[int]:
        """Positions of the complete pages that attention reads before the tail, found by their content."""
        places = self.table.pages[request.row, : int(self.table.count[request.row])].long() * self.pager.page
        slots = self.found_at((places[:, None] + torch.arange(self.pager.page)).flatten())
        pages = [slot // self.pager.page for slot in slots[:: self.pager.page]]
        assert slots == self.slots_of(pages).tolist(), "whole pages"
        return [request.pages.tolist().index(page) for page in pages]

    def held_positions(self, request: Request) -> list[int]:
        held = self.pager.ledger.held_by(request.rid)
        return [position for position, page in enumerate(request.pages.tolist()) if page in held]


# --- page arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "spanned", "complete"), [(0, 0, 0), (1, 1, 0), (63, 1, 0), (64, 1, 1), (65, 2, 1)])
def test_page_arithmetic(tokens: int, spanned: int, complete: int) -> None:
    assert (pages_spanned(tokens, PAGE_SIZE), pages_complete(tokens, PAGE_SIZE)) == (spanned, complete)
    assert align_up(tokens, PAGE_SIZE) == spanned * PAGE_SIZE


# --- the first window ------------------------------------------------------------------------------------------------


def test_the_first_window_is_predicted_from_the_prompt() -> None:
    server = Server()
    server.wanted.positions = [3, 6]
    request = server.prefill("a", 10 * PAGE_SIZE + 5)
    # 11 pages, so at most 5: the sink, the two wanted and the growing page; nothing else scored above the threshold.
    assert list(request.story.history) == [[0, 3, 6]]
    assert request.window == 0
    assert (request.resident.tail_start, int(server.table.tail_start[request.row])) == (10, 10)
    assert server.read(request) == request.resident.positions.tolist() == list(request.story.history)[-1]


def test_only_resident_pages_and_the_tail_stay_held() -> None:
    server = Server()
    server.wanted.positions = [3, 6]
    request = server.prefill("a", 10 * PAGE_SIZE + 5)
    assert server.held_positions(request) == [*request.resident.positions.tolist(), 10]
    assert server.pager.ledger.held_pages == len(request.resident.positions) + 1
    server.pager.ledger.check()


def test_the_set_is_within_its_budget() -> None:
    server = Server(budget=0.25)
    server.wanted.positions = list(range(16))
    request = server.prefill("a", 16 * PAGE_SIZE)
    assert server.held_positions(request) == request.resident.positions.tolist()
    assert len(request.resident.positions) == 4


def test_no_set_takes_more_than_half_of_the_device_pool() -> None:
    server = Server(budget=0.9)
    server.wanted.positions = list(range(20))
    request = server.prefill("a", 20 * PAGE_SIZE)
    assert len(request.resident.positions) == PHYSICAL // 2


def test_min_pages_does_not_ask_for_more_than_half_of_the_device_pool() -> None:
    server = Server(budget=0.1, min_pages=18)
    server.wanted.positions = list(range(20))
    request = server.prefill("a", 20 * PAGE_SIZE)
    assert len(request.resident.positions) == PHYSICAL // 2


@pytest.mark.parametrize("tokens", [16 * PAGE_SIZE, 16 * PAGE_SIZE + 1, 16 * PAGE_SIZE + 63])
def test_the_tail_starts_after_the_complete_pages(tokens: int) -> None:
    request = Server().prefill("a", tokens)
    assert request.resident.tail_start == 16


# --- the clock -------------------------------------------------------------------------------------------------------


def test_a_set_stays_for_a_window() -> None:
    server = Server()
    request = server.prefill("a", 10 * PAGE_SIZE)
    for step in range(1, 4 * WINDOW + 1):
        server.decode(request)
        assert request.window == step // WINDOW
        assert len(request.story.history) == request.window + 1
    assert server.lookahead.counts.refreshes == 5
    assert server.wanted.calls == 5


@pytest.mark.parametrize(("lead", "lag", "steps"), [(0, 0, 1), (0, 0, 6), (LEAD, LAG, 6), (LEAD, LAG, 40)])
def test_dense_steps_read_everything_and_the_first_set_is_predicted_from_them(lead: int, lag: int, steps: int) -> None:
    server = Server(lead, lag, window=LONG)
    server.wanted.positions = [2]
    request = server.prefill("a", 10 * PAGE_SIZE, dense_steps=steps)
    asked_at = None
    for step in range(1, steps + 1):
        assert (request.resident.tail_start, request.resident.positions.tolist()) == (0, [])
        assert server.held_positions(request) == list(range(len(request.pages)))
        server.decode(request)
        asked_at = asked_at or (step if server.wanted.calls else None)
    assert asked_at == steps - min(lead, steps // 4)
    server.decode(request)
    server.decode(request)
    assert 2 in request.resident.positions
    assert request.resident.tail_start > 0


@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize(("policy", "later"), [("wanted", [0, 2, 3, 6]), ("quest", [0, 2, 3, 6]), ("recency", None)])
def test_a_text_that_copies_keeps_what_comes_next(policy: str, later: list[int] | None, lead: int) -> None:
    """Its last eight tokens are those before the last one of page 2."""
    server = Server(lead, lead)
    server.lookahead.scorer.policies["quest"] = server.wanted  # type: ignore[index]
    server.wanted.values = {3: 0.9, 6: 0.5}
    prompt = list(range(10 * PAGE_SIZE + 5))
    text = [*prompt, *prompt[3 * PAGE_SIZE - 9 : 3 * PAGE_SIZE - 1]]
    request = server.prefill("a", len(prompt), policy=policy, prompt_lookup=8, text=text)
    for _ in range(2 + 2 * lead):
        server.decode(request)
    first = server.read(request)
    assert first == ([0, 3, 6] if later else [0, 7, 8, 9])
    for _ in range(4 * WINDOW):
        server.decode(request)
    assert server.read(request) == (later or first)


def test_what_is_copied_first_comes_first() -> None:
    """With room for one page beside the first and the last ones."""
    server = Server(budget=0.3)
    server.wanted.values = {6: 0.9}
    prompt = list(range(10 * PAGE_SIZE + 5))
    text = [*prompt, *prompt[3 * PAGE_SIZE - 9 : 3 * PAGE_SIZE - 1]]
    request = server.prefill("a", len(text), prompt_lookup=8, text=text, watch=(6,))
    assert server.read(request) == [0, 2]
    assert choose(server.lookahead.rules, np.zeros(10), 11, 0.3, "wanted", upcoming=[4, 2]).positions.tolist() == [0, 4]
    (window,) = request.story.windows
    assert window.watched == Watched(((6, 0.9, 0),), None)


def test_what_is_copied_is_told_by_what_is_computed() -> None:
    """Not by what the scheduler knows by then, which depends on time."""
    server = Server()
    prompt = list(range(10 * PAGE_SIZE + 5))
    text = [*prompt, *prompt[100:108]]
    first = server.prefill("a", len(prompt), prompt_lookup=8, text=text)
    later = server.prefill("b", len(text), prompt_lookup=8, text=text)
    assert (server.read(first), server.read(later)) == ([0], [0, 1])


@pytest.mark.parametrize("lead", [0, 2])
def test_sets_are_wider_while_a_text_repeats_its_prompt(lead: int) -> None:
    """And not any longer when it has stopped."""
    prompt = list(range(10 * PAGE_SIZE + 5))
    copied = prompt[3 * PAGE_SIZE - 9 : 3 * PAGE_SIZE + 5 * WINDOW]
    text = [*prompt, *copied, *range(9000, 9000 + 9 * WINDOW)]
    read: dict[float, list[list[int]]] = {}
    for widen in (1.0, 2.0):
        server = Server(lead, lead, budget=0.4)
        server.wanted.values = {6: 0.9, 8: 0.8, 1: 0.7}
        request = server.prefill("a", len(prompt), prompt_lookup=8, widen=widen, text=text)
        read[widen] = []
        while request.tokens < len(text):
            server.decode(request)
            read[widen].append(server.read(request))
        assert (request.story.widened > 1) == (widen > 1)
    assert read[1.0][0] == read[2.0][0] and read[1.0][-1] == read[2.0][-1], "neither before nor after"
    widest = max(read[2.0], key=len)
    assert any({0, 3, 6, 8, 1} <= set(pages) for pages in read[2.0]), "what is copied, and what is scored"
    assert max(map(len, read[1.0])) <= 4 < len(widest) <= 8, "four of eleven pages, and twice as many"


def test_a_list_gets_the_pages_after_its_last_entry() -> None:
    """Entries of twelve tokens from every other page, a word of its own after each."""
    prompt = list(range(12 * PAGE_SIZE + 5))
    entries = [prompt[page * PAGE_SIZE + 10 : page * PAGE_SIZE + 22] for page in (1, 3, 5, 7)]
    text = [*prompt, *(token for number, entry in enumerate(entries) for token in (*entry, 9000 + number))]
    server = Server(budget=0.5, window=16)
    server.wanted.values = {10: 0.9}
    request = server.prefill("a", len(prompt), prompt_lookup=6, widen=1.5, text=text)
    read = []
    while request.tokens < len(text):
        server.decode(request)
        read.append(set(server.read(request)))
    seen = list(dict.fromkeys(tuple(sorted(pages)) for pages in read))
    assert seen == [(0, 10), (0, 5, 6, 7, 10), (0, 7, 8, 9, 10)] and request.story.widened


@pytest.mark.parametrize(("pages", "later"), [(0, [0, 3]), (1, [0, 3, 9]), (2, [0, 3, 8, 9]), (9, [0, 3, 8, 9])])
def test_the_question_stays(pages: int, later: list[int]) -> None:
    """Of a prompt of ten pages and a generation of four, with room for eight."""
    server = Server(budget=0.6, prompt_pages=pages)
    server.wanted.positions = [3]
    request = server.prefill("a", 10 * PAGE_SIZE)
    for _ in range(4 * PAGE_SIZE - 2):
        server.decode(request)
    assert server.read(request) == later


def test_a_request_learns_what_pages_it_watches_were_worth() -> None:
    server = Server()
    server.wanted.values = {3: 0.9, 6: 0.5}
    request = server.prefill("a", 10 * PAGE_SIZE + 5, watch=(3, 4, 6, 10))
    while request.window == 0:
        server.decode(request)
    first, second = (window.watched for window in request.story.windows)
    assert first == Watched(((3, 0.9, 0), (4, 0.0, 2), (6, 0.5, 1)), 0.5)
    assert second == first


def test_a_prompt_that_is_not_on_the_device_cannot_be_read_densely() -> None:
    server = Server()
    server.wanted.positions = [2]
    request = server.prefill("a", 10 * PAGE_SIZE, dense_steps=5, promised=6)
    server.decode(request)
    assert request.resident.tail_start > 0
    assert 2 in request.resident.positions


def test_first_windows_have_different_lengths() -> None:
    server = Server()
    lengths = []
    for seed in range(2 * WINDOW):
        request = server.prefill(f"r{seed}", PAGE_SIZE, seed=seed)
        lengths.append(request.steps_left)
    assert lengths == [4, 3, 2, 1, 4, 3, 2, 1]


def test_after_its_first_window_every_window_is_whole() -> None:
    server = Server()
    request = server.prefill("a", 10 * PAGE_SIZE, seed=3)
    refreshed = []
    for step in range(1, 10):
        before = request.window
        server.decode(request)
        refreshed += [step] if request.window > before else []
    assert refreshed == [1, 5, 9]


def test_only_requests_whose_window_ends_are_refreshed() -> None:
    server = Server()
    first = server.prefill("a", 6 * PAGE_SIZE, seed=0)
    second = server.prefill("b", 6 * PAGE_SIZE, seed=2)
    for _ in range(2):
        server.lookahead.refresh(server.lookahead.end_step([first, second]))
    assert (first.window, second.window) == (0, 1)


@pytest.mark.parametrize("page", [16, 64, 256])
def test_a_new_window_brings_other_pages_in(page: int) -> None:
    server = Server(page=page)
    server.wanted.positions = [1, 2, 3]
    request = server.prefill("a", 12 * page)
    assert set(server.read(request)) >= {0, 1, 2, 3, 11}
    other = server.prefill("b", 17 * page, dense=True)  # the device pool is full: what was not held is gone
    assert server.pager.ledger.evictions > 0
    server.pager.forget(other.rid)
    server.wanted.positions = [5, 6, 7]
    for _ in range(WINDOW):
        server.decode(request)
    assert set(server.read(request)) == {0, 5, 6, 7}
    assert server.pager.ledger.recalls > 0
    assert server.held_positions(request) == [*request.resident.positions.tolist(), 12]
    server.pager.ledger.check()


@pytest.mark.parametrize("page", [16, 64, 256])
def test_pages_completed_in_a_window_leave_the_tail_with_the_next(page: int) -> None:
    server = Server(window=2 * page, page=page)
    request = server.prefill("a", 8 * page)
    for _ in range(2 * page - 1):
        server.decode(request)
    assert request.resident.tail_start == 8
    assert set(server.held_positions(request)) >= {8, 9}
    server.decode(request)
    assert request.resident.tail_start == 10
    assert server.held_positions(request) == request.resident.positions.tolist()


# --- dense requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [10 * PAGE_SIZE, 10 * PAGE_SIZE + 5])
def test_a_dense_request_keeps_everything(tokens: int) -> None:
    server = Server()
    request = server.prefill("a", tokens, dense=True)
    for _ in range(3 * WINDOW):
        server.decode(request)
    assert (request.resident.positions.tolist(), request.resident.tail_start) == ([], 0)
    assert server.held_positions(request) == list(range(11))
    assert (int(server.table.count[request.row]), int(server.table.tail_start[request.row])) == (0, 0)
    assert server.wanted.calls == 0


def test_a_request_below_min_context_is_dense_until_a_window_begins_above_it() -> None:
    server = Server(min_context=8 * PAGE_SIZE)
    request = server.prefill("a", 8 * PAGE_SIZE - 1)
    assert (request.resident.tail_start, server.held_positions(request)) == (0, list(range(8)))
    for _ in range(WINDOW - 1):
        server.decode(request)
    assert request.resident.tail_start == 0
    server.decode(request)
    assert request.tokens == 8 * PAGE_SIZE + 3
    assert request.resident.tail_start == 8
    assert server.held_positions(request) == [*request.resident.positions.tolist(), 8]
    assert len(request.resident.positions) < 8


def test_min_context_itself_is_sparse() -> None:
    server = Server(min_context=8 * PAGE_SIZE)
    assert server.prefill("a", 8 * PAGE_SIZE).resident.tail_start == 8
    assert server.prefill("b", 8 * PAGE_SIZE - 1).resident.tail_start == 0


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


def given_sets(text: str) -> tuple[GivenSet, ...]:
    return RequestOptions.parse({"lsa": {"sets": text}}, LSAConfig()).sets


def reads(server: Server, request: Request, steps: int) -> dict[int, tuple[int, list[int]]]:
    """What each decode step reads: where the tail starts, and the positions before it, by tokens of the request."""
    seen = {}
    for _ in range(steps):
        server.before_decode(request)
        seen[request.tokens] = (int(server.table.tail_start[request.row]), server.read(request))
        assert set(server.held_positions(request)) >= {
            *server.read(request),
            *range(seen[request.tokens][0], len(request.pages)),
        }
        server.after_decode(request)
        server.pager.ledger.check()
    return seen


SERVERS = [pytest.param((0, 0, WINDOW), id="cpu"), pytest.param((5, 2, 8), id="gpu")]
"""Lead, lag and window."""
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


def two_requests(**options: object) -> tuple[Server, Request, Request]:
    """One reads 0, 2, 4, 6, 8 and 11, of falling scores but for both ends; the other 0, 1, 2 and 7."""
    server = Server(**options)
    server.wanted.values = {2: 5.0, 4: 4.0, 6: 3.0, 8: 2.0}
    large = server.prefill("large", 12 * PAGE_SIZE)
    server.wanted.values = {1: 2.0, 2: 1.0}
    small = server.prefill("small", 8 * PAGE_SIZE)
    assert (server.read(large), server.read(small)) == ([0, 2, 4, 6, 8, 11], [0, 1, 2, 7])
    return server, large, small


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


# --- stages that fail ------------------------------------------------------------------------------------------------


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("injected")


STAGES: dict[str, Callable[[Server, pytest.MonkeyPatch], None]] = {
    "choose": lambda server, patch: patch.setattr("sglang_lsa.engine.chooser.choose", fail),
    "recall": lambda server, patch: patch.setattr(server.pager, "hold_if_spare", fail),
    "table": lambda server, patch: patch.setattr(server.table, "remap", fail),
}
"""What a broken stage of a refresh calls."""


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


# --- heat ------------------------------------------------------------------------------------------------------------


def test_a_set_that_is_read_warms_its_pages() -> None:
    server = Server()
    server.wanted.positions = [3, 6]
    request = server.prefill("a", 10 * PAGE_SIZE + 5)
    heat = server.pager.ledger.heat
    assert np.flatnonzero(heat.values).tolist() == request.pages[[0, 3, 6]].tolist()
    server.wanted.positions = [6, 7]
    for _ in range(WINDOW):
        server.decode(request)
    assert server.read(request) == [0, 6, 7]
    assert heat.hottest(request.pages, 9).tolist() == request.pages[[0, 6, 7, 3]].tolist()


def test_sets_that_are_not_read_warm_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    server.prefill("dense", 10 * PAGE_SIZE, dense=True)
    server.prefill("short", 3 * PAGE_SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(server.table, "remap", fail)
        server.prefill("failed", 8 * PAGE_SIZE)
    assert not server.pager.ledger.heat.values.any()


# --- as on a GPU: a refresh takes several steps -----------------------------------------------------------------------
OLD, NEW = [0, 1, 2, 3, 11], [0, 5, 6, 7]


class Overlapped(Server):
    """Request ``a`` of 12 pages, in its first window, which began with its first decode step; step 2 is next to end.

    The pages that :data:`NEW` adds to :data:`OLD` have only their copy in the mirror.
    """

    def __init__(self, policy: str = "wanted", tokens: int = 12 * PAGE_SIZE) -> None:
        super().__init__(LEAD, LAG, window=LONG)
        self.wanted.positions = self.queued.positions = [1, 2, 3]
        self.a = self.prefill("a", tokens, policy=policy)
        self.steps = 0
        self.begin_next()
        self.end()
        if policy == "queued":
            self.queued.compute()
        self.begin_next()
        assert self.read(self.a) == [position for position in OLD if position < self.a.resident.tail_start]
        other = self.prefill("b", 17 * PAGE_SIZE, dense=True)
        self.gone(other)
        assert not self.pager.v2p[self.a.pages[[5, 6, 7]]].any()
        self.late(stores=False)
        self.wanted.positions = self.queued.positions = [5, 6, 7]

    def begin_next(self) -> None:
        self.steps += 1
        self.before_decode(self.a)

    def end(self) -> None:
        self.after_decode(self.a)

    def begin(self, step: int) -> None:
        """Go on until decode step ``step`` has begun."""
        while self.steps < step:
            self.end()
            self.begin_next()

    def gone(self, request: Request) -> None:
        self.pager.forget(request.rid)
        self.lookahead.forget(request)


def test_the_first_window_is_dense_until_its_scores_are_read() -> None:
    server = Server(LEAD, LAG, window=LONG)
    server.queued.positions = [3, 6]
    request = server.prefill("a", 10 * PAGE_SIZE + 5, policy="queued")
    server.decode(request)
    assert (request.window, request.resident.tail_start, list(request.story.history)) == (0, 0, [])
    assert server.held_positions(request) == list(range(11))
    server.queued.compute()
    server.before_decode(request)
    assert list(request.story.history) == [[0, 3, 6]]
    assert server.read(request) == [0, 3, 6]
    assert server.held_positions(request) == [0, 3, 6, 10]
    assert (int(server.table.tail_start[request.row]), request.story.stalls) == (10, 0)
    assert server.lookahead.refresher.on_their_way == {}


def test_other_passes_count_for_the_lag() -> None:
    """Also a prefill of somebody else tells that the pass whose queries are scored is done."""
    server = Server(LEAD, LAG, window=LONG)
    request = server.prefill("a", 10 * PAGE_SIZE)
    server.lookahead.begin_step()
    assert request.resident.tail_start == 0
    server.lookahead.begin_step()
    assert request.resident.tail_start == 10


def test_the_first_windows_of_a_gpu_are_spread_over_what_leaves_time_to_prefetch() -> None:
    server = Server(LEAD, LAG, window=LONG)
    lengths = [server.prefill(f"r{seed}", PAGE_SIZE, seed=seed).steps_left for seed in range(6)]
    assert lengths == [8, 7, 6, 8, 7, 6]
    assert min(lengths) > LEAD


@pytest.mark.parametrize(("lead", "seed", "window"), [(0, 0, 64), (16, 0, 64), (16, 5, 64), (3, 7, 50), (0, 0, 8)])
def test_windows_after_the_first_are_whole(lead: int, seed: int, window: int) -> None:
    server = Server(lead, window=window)
    request = server.prefill("a", 8 * PAGE_SIZE, seed=seed)
    leads = set()
    for _ in range(240):
        server.decode(request)
        if request.resident.next is None:
            leads.add(request.lead)
    lengths = [after.tokens - before.tokens for before, after in pairwise(list(request.story.windows)[:-1])]
    assert lengths[0] == window - seed % (window - lead)
    assert set(lengths[1:]) == {window}
    assert leads == {lead}


@pytest.mark.parametrize(("lead", "tail_start", "steps"), [(16, 5, 4), (16, 0, 0), (0, 5, 0)])
def test_who_reads_what_its_prompt_read_has_time_for_its_first_set(lead: int, tail_start: int, steps: int) -> None:
    """Its pages may be on the host; those of others are there. Nothing comes late on a CPU."""
    request = Request("a", 1, Asked("wanted", 0.5), tokens=640, prompt_tokens=640)
    request.resident.tail_start = tail_start
    assert Clock(window=64, lead=lead).begin(request), "its first set is predicted now"
    assert request.steps_left == steps


def test_a_refresh_starts_before_its_window() -> None:
    server = Overlapped()
    a = server.a
    assert (a.window, server.wanted.calls) == (0, 1)
    server.begin(LONG - LEAD)
    assert (a.window, server.wanted.calls, a.resident.next) == (0, 1, None)
    server.end()
    assert (a.window, server.wanted.calls) == (1, 2)
    assert a.resident.next is not None and a.resident.next.state is State.QUEUED
    assert server.lookahead.refresher.on_their_way == {"a": a}


def test_scores_are_read_when_their_pass_is_done() -> None:
    """Exactly ``lag`` passes later: before, there is nothing to read; later, pages would come later."""
    server = Overlapped("queued")
    server.begin(LONG - LEAD)
    server.end()
    for _ in range(LAG - 1):
        server.begin_next()
        assert server.a.resident.next is not None and server.a.resident.next.state is State.QUEUED
        server.end()
    server.queued.compute()
    assert server.gpu.recalling == []
    server.begin_next()
    assert server.a.resident.next is not None and server.a.resident.next.state is not State.QUEUED
    assert server.a.resident.next.positions.tolist() == NEW
    (recall,) = server.gpu.recalling
    assert recall.virtual.tolist() == server.a.pages[[5, 6, 7]].tolist()


def test_pages_arrive_while_the_old_set_is_read() -> None:
    server = Overlapped()
    a = server.a
    server.begin(LONG - LEAD + LAG)
    for step in range(LONG - LEAD + LAG, LONG + 1):
        server.begin(step)
        assert server.read(a) == a.resident.positions.tolist() == OLD
        assert server.held_positions(a) == sorted({*OLD, *NEW, 12})
        server.pager.ledger.check()
        server.gpu.arrive()
    server.begin(LONG + 1)
    assert server.read(a) == a.resident.positions.tolist() == NEW
    assert server.held_positions(a) == [*NEW, 12]
    assert list(a.story.history) == [OLD, NEW]
    assert (a.story.stalls, server.lookahead.counts.stalls, server.pager.late_pages) == (0, 0, 0)
    assert server.gpu.recalled_pages == 3
    server.pager.ledger.check()


@pytest.mark.parametrize("late", [False, True])
def test_a_window_begins_in_its_step_whether_its_pages_are_there_or_not(late: bool) -> None:
    """The device waits for those that are not, and for no copy that was sent for later."""
    server = Overlapped()
    a = server.a
    server.begin(LONG)
    assert server.read(a) == OLD
    if not late:
        server.gpu.arrive()
    elsewhere = [page for page in a.pages[[4, 8, 9, 10]].tolist() if not server.pager.v2p[page]]
    assert server.pager.hold("b", elsewhere[:1])
    server.begin(LONG + 1)
    assert server.read(a) == a.resident.positions.tolist() == NEW
    assert server.held_positions(a) == [*NEW, 12]
    assert (a.story.stalls, a.window, list(a.story.history)) == (0, 1, [OLD, NEW])
    assert (server.gpu.calls["before_next_kernel"], server.pager.late_pages) == ((1, 3) if late else (0, 0))
    server.gpu.queue(lambda number: None, prefill=False)
    server.gpu.compute_to(len(server.gpu.compute))
    assert len(server.gpu.recalling) == 1
    server.pager.ledger.check()


@pytest.mark.parametrize("late", [0, 1, 2])
def test_late_pages_do_not_move_the_next_window(late: int) -> None:
    server = Overlapped()
    server.begin(LONG + late)
    server.gpu.arrive()
    server.begin(2 * LONG - LEAD)
    assert (server.a.window, server.wanted.calls) == (1, 2)
    server.wanted.positions = [5, 9]
    server.begin(2 * LONG - LEAD + 1)
    assert (server.a.window, server.wanted.calls) == (2, 3)
    server.begin(2 * LONG)
    assert server.read(server.a) == NEW
    server.begin(2 * LONG + 1)
    assert server.read(server.a) == [0, 5, 9]


def test_which_pages_are_read_does_not_depend_on_when_they_arrive() -> None:
    """Also where the host waits for copies, because nothing else is left to hold a set with."""

    def history(delay: int) -> list[list[int]]:
        server = Overlapped()
        waiting = 0
        while server.steps < 5 * LONG:
            server.wanted.positions = [1 + (3 * server.a.window + place) % 11 for place in range(3)]
            server.begin(server.steps + 1)
            waiting = waiting + 1 if server.gpu.recalling else 0
            if waiting > delay:
                server.gpu.arrive()
        return list(server.a.story.history)

    expected = history(0)
    assert len(expected) == 5
    for delay in (1, 2, 3, 4, 5, 6, 20, 1000):
        assert history(delay) == expected


def test_pages_opened_during_a_refresh_belong_to_the_tail() -> None:
    server = Overlapped(tokens=12 * PAGE_SIZE - 6)
    a = server.a
    assert a.resident.tail_start == 11
    server.begin(LONG - LEAD + LAG)
    assert (len(a.pages), a.tokens) == (12, 12 * PAGE_SIZE - 1)
    server.gpu.arrive()
    server.begin(LONG + 1)
    assert len(a.pages) == 13
    assert (server.read(a), a.resident.tail_start) == (NEW, 11)
    assert server.held_positions(a) == [*NEW, 11, 12]


@pytest.mark.parametrize("step", [LONG - LEAD + 1, LONG - LEAD + LAG, LONG])
def test_a_request_forgotten_during_a_refresh_leaves_nothing(step: int) -> None:
    server = Overlapped()
    server.begin(step)
    assert server.lookahead.refresher.on_their_way == {"a": server.a}
    table = server.table.table.clone()
    server.gone(server.a)
    server.pager.ledger.release(server.a.pages)
    assert server.lookahead.refresher.on_their_way == {}
    assert server.pager.ledger.holders() == []
    for _ in range(LONG):
        server.lookahead.begin_step()
    server.pager.ledger.check()
    server.gpu.arrive()
    server.pager.ledger.check()
    assert server.pager.unpromised_pages == PHYSICAL
    assert torch.equal(server.table.table, table)


def test_a_set_without_room_costs_its_window_and_no_more() -> None:
    server = Overlapped()
    a = server.a
    others = server.allocate(server.pager.unpromised_pages - 1)
    assert server.pager.hold("c", others)
    server.begin(LONG - LEAD // 2)
    assert (a.story.stalls, a.resident.next is None) == (0, False), "there is time to try again"
    server.begin(LONG - LEAD // 2 + 1)
    assert (a.story.stalls, server.lookahead.counts.stalls, a.window) == (1, 1, 1)
    assert server.lookahead.refresher.on_their_way == {}
    assert server.held_positions(a) == [*OLD, 12]
    server.pager.forget("c")
    server.pager.ledger.release(others)
    for step in range(LONG - LEAD // 2 + 1, 2 * LONG + 1):
        server.begin(step)
        assert server.read(a) == OLD
        server.gpu.arrive()
    assert server.wanted.calls == 3
    server.begin(2 * LONG + 1)
    assert server.read(a) == NEW
    assert (a.story.stalls, list(a.story.history), server.pager.late_pages) == (1, [OLD, NEW], 0)


def test_pages_replaced_during_a_refresh_are_replaced_in_the_new_set() -> None:
    """Another request put the same tokens into the radix tree meanwhile; its page is used from then on."""
    server = Overlapped()
    a = server.a
    server.begin(LONG - LEAD + LAG)
    (tree,) = server.allocate(1).tolist()
    old = int(a.pages[6])
    server.pager.mirror.pages[tree] = server.pager.mirror.pages[old]  # the same content
    place = int(server.pager.v2p[old])
    server.pager.ledger.substitute("a", [old], [tree])
    a.pages = np.where(a.pages == old, tree, a.pages)
    server.pager.ledger.release([old])
    server.gpu.arrive()
    server.begin(LONG + 1)
    assert int(server.pager.v2p[tree]) == place
    assert server.table.pages[a.row, :4].tolist() == server.pager.v2p[a.pages[NEW]].tolist()
    assert server.held_positions(a) == [*NEW, 12]
    server.pager.ledger.check()


def test_a_policy_that_fails_is_not_waited_for_any_longer() -> None:
    server = Overlapped()
    server.wanted.error = RuntimeError("no keys")
    server.begin(LONG)
    server.gpu.arrive()
    server.begin(LONG + 1)
    assert server.lookahead.counts.fallbacks == 1
    assert server.a.resident.positions.tolist() == [0, 8, 9, 10, 11]
    assert server.a.story.stalls == 0


def test_heat_grows_when_a_set_is_read_not_when_it_is_chosen() -> None:
    server = Overlapped()
    heat = server.pager.ledger.heat
    server.begin(LONG)
    server.gpu.arrive()
    assert not heat.values[server.a.pages[[5, 6, 7]]].any()
    server.begin(LONG + 1)
    assert heat.values[server.a.pages[[5, 6, 7]]].all()


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


def test_a_smaller_set_leaves_the_next_one_alone() -> None:
    server = Overlapped()
    a = server.a
    server.begin(LONG - LEAD + LAG)
    assert a.resident.next is not None and a.resident.next.held
    obtainable = server.pager.unpromised_pages
    server.lookahead.shrink([a], 1)
    assert server.read(a) == a.resident.positions.tolist() == [0, 11]
    assert server.held_positions(a) == [0, 5, 6, 7, 11, 12]
    assert server.pager.unpromised_pages == obtainable + 3
    for step in range(LONG - LEAD + LAG, LONG + 1):
        server.begin(step)
        assert server.read(a) == [0, 11]
        server.gpu.arrive()
    server.begin(LONG + 1)
    assert server.read(a) == NEW
    assert server.held_positions(a) == [*NEW, 12]
    assert (a.story.history, a.story.shrunk, a.story.stalls) == ([OLD, [0, 11], NEW], 1, 0)
    server.pager.ledger.check()


def test_what_was_let_go_can_be_had_when_no_pass_reads_it() -> None:
    server = Overlapped()
    number = server.pager.ledger.forward_started()
    obtainable = server.pager.unpromised_pages
    server.lookahead.shrink([server.a], 1)
    assert server.read(server.a) == [0, 11]
    assert (server.pager.unpromised_pages, server.pager.unpromised_later) == (obtainable, obtainable + 3)
    server.pager.ledger.forward_finished(number)
    assert server.pager.unpromised_pages == obtainable + 3


# --- a request that cannot be read whole -----------------------------------------------------------------------------


PROMPT = 12 * PAGE_SIZE + 10
FIRST = [0, 3, 6]
"""What it reads in its first window; page 12 is the growing one."""


def streamed(lead: int = LEAD, lag: int = LAG, promised: int = 6, **options: object) -> tuple[Server, Request]:
    """The prompt of ``a`` was streamed; of its pages, only the last is on the device. The next pass is its first step.

    Three others decode. A first set need not leave them a page each to grow into.
    """
    server = Server(lead, lag, window=LONG, **options)
    server.late(stores=False)
    server.wanted.positions = server.queued.positions = [3, 6]
    request = server.prefill("a", PROMPT, promised=promised, policy="queued" if lag else "wanted")
    server.lookahead.clock.running = 3
    if lag:
        server.queued.compute()
        assert server.held_positions(request) == [12]
        assert owed(server.pager) == {"a": promised}
        assert server.lookahead.sets.incomplete == server.lookahead.refresher.on_their_way == {"a": request}
    return server, request


def first_step(server: Server, request: Request) -> None:
    server.before_decode(request)
    server.lookahead.complete_first(["a"])


def is_complete(server: Server, request: Request, positions: list[int]) -> None:
    assert not request.resident.incomplete
    assert server.lookahead.sets.incomplete == server.lookahead.refresher.on_their_way == {}
    assert server.read(request) == request.resident.positions.tolist() == positions
    assert (request.resident.tail_start, int(server.table.tail_start[request.row])) == (12, 12)
    assert server.held_positions(request) == [*positions, 12]
    assert request.story.history == [positions]
    server.pager.ledger.check()


def test_on_a_cpu_the_first_set_is_there_before_the_first_step() -> None:
    server = Server()
    server.wanted.positions = [3, 6]
    request = server.prefill("a", PROMPT, promised=6)
    is_complete(server, request, FIRST)
    assert owed(server.pager) == {}
    assert (request.window, request.story.stalls, request.story.shrunk) == (0, 0, 0)


def test_the_first_step_waits_for_scores_and_pages() -> None:
    server, request = streamed()
    first_step(server, request)
    is_complete(server, request, FIRST)
    assert server.gpu.calls["before_next_kernel"] == 1
    assert owed(server.pager) == {}, "what was promised is used"
    assert (request.window, request.story.stalls, request.story.shrunk, server.pager.late_pages) == (0, 0, 0, 0)
    server.after_decode(request)
    assert request.story.windows[-1].tokens == PROMPT + 1


def test_what_has_come_meanwhile_is_not_waited_for() -> None:
    """A prefill of somebody else ran in between."""
    server, request = streamed()
    for _ in range(LAG):
        server.lookahead.begin_step()
    assert request.resident.next is not None and request.resident.next.held
    assert owed(server.pager) == {}
    server.gpu.arrive()
    first_step(server, request)
    is_complete(server, request, FIRST)
    assert server.gpu.calls["before_next_kernel"] == 0


def test_first_sets_that_cannot_wait_are_chosen_for_their_groups_at_once() -> None:
    server, choosing = Server(LEAD, LAG, window=LONG), []

    def company(requests: Sequence[Request]) -> Company:
        choosing.append([request.rid for request in requests])
        return Company(requests, (), PAGE_SIZE)

    server.lookahead.refresher.chooser.company = company
    server.wanted.positions = [3, 6]
    requests = [server.prefill(rid, PROMPT, promised=4) for rid in ("a", "b", "c")]
    server.before_decode(requests[0])
    server.lookahead.complete_first(["b", "a"])
    assert choosing == [["b", "a"]]
    assert [request.resident.positions.tolist() for request in requests[:2]] == [FIRST, FIRST]
    assert list(server.lookahead.sets.incomplete) == ["c"]


def test_a_first_set_that_cannot_be_chosen_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs this request its set, and nobody else."""
    server = Server(LEAD, LAG, window=LONG)
    server.wanted.positions = [3, 6]
    requests = [server.prefill(rid, PROMPT, promised=4) for rid in ("a", "b")]
    chosen = Chooser.choose

    def choose_b(self: Chooser, request: Request, new: Refresh) -> object:
        if request.rid == "a":
            raise RuntimeError("no set")
        return chosen(self, request, new)

    monkeypatch.setattr(Chooser, "choose", choose_b)
    server.before_decode(requests[0])
    server.lookahead.complete_first(["a", "b"])
    a, b = requests
    assert (a.window, a.story.failures, a.resident.positions.tolist(), a.resident.tail_start) == (0, 1, [], 12)
    assert (b.window, b.story.failures, b.resident.positions.tolist(), b.resident.tail_start) == (0, 0, FIRST, 12)


def test_only_requests_that_decode_are_completed() -> None:
    server, request = streamed()
    server.lookahead.begin_step()
    server.lookahead.complete_first(["b", "c"])
    assert request.resident.incomplete
    assert server.lookahead.sets.incomplete == {"a": request}
    assert server.held_positions(request) == [12]
    assert owed(server.pager) == {"a": 6}


def test_a_short_request_that_cannot_be_read_whole_gets_a_set() -> None:
    server, request = streamed(min_context=20 * PAGE_SIZE)
    first_step(server, request)
    is_complete(server, request, FIRST)


def test_the_promise_stands_until_the_set_is_held() -> None:
    """The scores are there, but no device pages."""
    server, request = streamed()
    others = server.allocate(server.pager.ledger.obtainable_pages)
    assert server.pager.hold("neighbour", others)
    for _ in range(LAG):
        server.lookahead.begin_step()
    assert (
        request.resident.next is not None
        and request.resident.next.state is not State.QUEUED
        and not request.resident.next.held
    )
    assert owed(server.pager) == {"a": 6}
    assert (request.story.stalls, request.story.shrunk) == (0, 0)
    server.pager.forget("neighbour")
    server.pager.ledger.release(others)
    server.lookahead.begin_step()
    assert request.resident.next.held
    assert owed(server.pager) == {}


def test_pages_in_flight_are_waited_for() -> None:
    """All pages that could be given up are on their way to the mirror."""
    server, request = streamed()
    server.gpu.late_stores = True
    others = server.allocate(server.pager.ledger.obtainable_pages)
    assert server.pager.hold("neighbour", others)
    server.pager.store(others)
    server.pager.forget("neighbour")
    assert server.pager.ledger.obtainable_pages == 0
    first_step(server, request)
    is_complete(server, request, FIRST)
    assert owed(server.pager) == {}
    assert server.gpu.storing == []
    assert request.story.shrunk == 0


@pytest.mark.parametrize(
    ("room", "positions"), [(3, [0, 3, 6]), (2, [0, 3]), (1, [0]), (0, [])], ids=["all", "two", "one", "none"]
)
def test_a_first_set_is_as_large_as_fits(room: int, positions: list[int]) -> None:
    server, request = streamed()
    server.pager.reservations.settle("a")  # a promise that was not kept
    server.leave(room)
    first_step(server, request)
    is_complete(server, request, positions)
    assert request.story.shrunk == server.lookahead.counts.shrunk == int(room < 3)


@pytest.mark.parametrize("stage", ["choose", "recall"])
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_when_nothing_works_the_tail_is_read(gpu: bool, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        server = Server(LEAD, LAG, window=LONG) if gpu else Server(window=LONG)
        server.wanted.positions = [3, 6]
        STAGES[stage](server, patch)
        request = server.prefill("a", PROMPT, promised=6)
        first_step(server, request)
        assert (request.story.failures, request.story.stalls) == (1 if gpu else 2, 1), (
            "a CPU tries before the step, too"
        )
    is_complete(server, request, [])
    assert server.held_positions(request) == [12]
    server.after_decode(request)
    for _ in range(2 * LONG):
        server.decode(request)
    assert server.read(request) == FIRST
    assert owed(server.pager) == {}


def test_a_first_set_that_the_table_refuses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    server, request = streamed()
    remap, calls = server.table.remap, []

    def broken_once(row: int, physical: np.ndarray, tail_start: int) -> None:
        calls.append(len(physical))
        if len(calls) == 1:
            raise RuntimeError("no such row")
        remap(row, physical, tail_start)

    monkeypatch.setattr(server.table, "remap", broken_once)
    first_step(server, request)
    assert calls == [3, 0]
    assert (request.story.failures, request.story.stalls) == (1, 1)
    is_complete(server, request, [])


def test_a_given_set_completes_a_request_too() -> None:
    """Whatever its tokens say: it cannot be dense until then."""
    server = Server(LEAD, LAG, window=LONG)
    sets = given_sets(f"{PROMPT + 20}:12:2,5;{PROMPT + 30}:12:4")
    request = server.prefill("a", PROMPT, promised=6, sets=sets)
    server.push_off()
    first_step(server, request)
    is_complete(server, request, [2, 5])
    server.after_decode(request)
    seen = reads(server, request, 40)
    assert [seen[PROMPT + step][1] for step in (2, 29, 30, 41)] == [[2, 5], [2, 5], [4], [4]]


def test_a_request_forgotten_before_its_first_set() -> None:
    server, request = streamed()
    server.pager.forget("a")
    server.lookahead.forget(request)
    assert server.lookahead.sets.incomplete == server.lookahead.refresher.on_their_way == owed(server.pager) == {}
    server.lookahead.begin_step()
    server.lookahead.complete_first(["a"])
    assert server.pager.ledger.holders() == []


# --- requests whose windows end in the same step ---------------------------------------------------------------------


class Several(Server):
    """Three requests of 6 pages that decode together; their first windows begin in step 3. The pages that their second
    windows add have only their copy in the mirror."""

    def __init__(self) -> None:
        super().__init__(LEAD, LAG, window=LONG)
        self.wanted.positions = [1]
        self.all = [self.prefill(name, 6 * PAGE_SIZE) for name in "abc"]
        while any(not one.resident.tail_start for one in self.all):
            self.step()
        self.old = [self.read(one) for one in self.all]
        self.push_off()
        self.late(stores=False)
        self.wanted.positions = [3]
        self.new = [[0, 3]] * 3

    def step(self) -> None:
        for request in self.all:
            request.tokens += 1
            if request.tokens % PAGE_SIZE == 1:
                request.pages = np.append(request.pages, self.allocate(1))
                self.hold(request.rid, request.pages[-1:])
                self.write(self.slots_of(request.pages[-1:]))
        self.lookahead.begin_step()
        self.lookahead.refresh(self.lookahead.end_step(self.all))

    def to_the_next_window(self) -> None:
        while any(len(one.story.windows) + one.story.failures < 2 for one in self.all):
            self.step()
            self.gpu.arrive()

    def reads(self) -> list[list[int]]:
        """What each reads, which its table, its records and the ledger agree about."""
        for request in self.all:
            assert self.read(request) == request.resident.positions.tolist()
            assert self.held_positions(request) == [*request.resident.positions, *range(request.resident.tail_start, 7)]
        self.pager.ledger.check()
        return [self.read(request) for request in self.all]


def raises(when: Callable[..., bool], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """``otherwise``, but for what it cannot do."""

    def instead(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise RuntimeError("injected")
        return otherwise(*arguments, **options)

    return instead


def test_pages_of_requests_that_refresh_together_come_in_one_copy() -> None:
    server = Several()
    while not server.gpu.recalling:
        server.step()
    (recall,) = server.gpu.recalling
    assert sorted(recall.virtual.tolist()) == [int(one.pages[3]) for one in server.all]
    writes = []
    server.table.remap_all = raises(lambda rows, *_: writes.append(rows.tolist()), server.table.remap_all)  # type: ignore
    server.table.remap = fail  # type: ignore[method-assign]
    server.to_the_next_window()
    assert server.reads() == server.new
    assert writes == [[1, 2, 3]], "and the table changes in one"
    assert server.lookahead.counts.failures == server.pager.late_pages == 0


@pytest.mark.parametrize("broken", [None, 0, 1, 2])
def test_a_copy_of_many_that_fails_is_tried_for_each(broken: int | None) -> None:
    """One that fails again costs its own request a window."""
    server = Several()
    page = None if broken is None else int(server.all[broken].pages[3])
    server.gpu.recall = raises(lambda _, virtual, *__: len(virtual) > 1 or page in virtual, server.gpu.recall)  # type: ignore
    server.to_the_next_window()
    expected = [server.old[index] if index == broken else server.new[index] for index in range(3)]
    assert server.reads() == expected
    assert [one.story.failures for one in server.all] == [int(index == broken) for index in range(3)]


@pytest.mark.parametrize("broken", [None, 0, 2])
def test_a_table_that_refuses_many_rows_is_given_each(broken: int | None) -> None:
    server = Several()
    server.table.remap_all = fail  # type: ignore[method-assign]
    server.table.remap = raises(  # type: ignore[method-assign]
        lambda row, *_: broken is not None and row == server.all[broken].row, server.table.remap
    )
    server.to_the_next_window()
    assert server.reads() == [server.old[index] if index == broken else server.new[index] for index in range(3)]
    assert [one.story.failures for one in server.all] == [int(index == broken) for index in range(3)]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_window_that_cannot_begin_leaves_the_table_as_it_was(broken: int) -> None:
    server = Several()
    page = server.all[broken].pages[3]
    server.pager.require = raises(lambda pages, *_: page in pages, server.pager.require)  # type: ignore[method-assign]
    server.to_the_next_window()
    assert server.reads() == [server.old[index] if index == broken else server.new[index] for index in range(3)]
    assert [one.story.failures for one in server.all] == [int(index == broken) for index in range(3)]


def test_a_request_that_ends_while_others_refresh_with_it() -> None:
    server = Several()
    while not server.gpu.recalling:
        server.step()
    gone = server.all.pop(1)
    server.pager.forget(gone.rid)
    server.lookahead.forget(gone)
    server.to_the_next_window()
    assert server.reads() == server.new[:2]
    assert not server.pager.ledger.held_by(gone.rid)
