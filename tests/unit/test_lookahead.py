"""The window clock: when resident sets change, what is held for them, and what happens when they cannot change."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.lookahead import Lookahead
from sglang_lsa.pages import align_up, pages_complete, pages_spanned
from sglang_lsa.policies import Policy, Random, Recency, Request
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.resident_table import ResidentTable

PHYSICAL, VIRTUAL = 24, 64
WINDOW = 4


class Wanted:
    """A policy that wants certain positions; or fails."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.error: Exception | None = None
        self.calls = 0

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.error is not None:
            raise self.error
        scores = np.zeros(len(pages))
        scores[[position for position in self.positions if position < len(pages)]] = 1.0
        return scores


class Server:
    """A lookahead over a real pager. Requests own runs of virtual pages; content is the number of the page."""

    def __init__(self, **options: object) -> None:
        defaults = {"budget": 0.5, "min_pages": 1, "window": WINDOW, "sink_pages": 1, "recent_pages": 1}
        self.config = LSAConfig.from_mapping({**defaults, "min_context": 4 * PAGE_SIZE, **options})
        keys, values = ([torch.zeros((PHYSICAL + 1) * PAGE_SIZE, 1, 2)] for _ in range(2))
        self.pager = Pager(keys, values, VIRTUAL, PAGE_SIZE)
        self.table = ResidentTable(16, 32)
        self.wanted = Wanted()
        policies: dict[str, Policy] = {"wanted": self.wanted, "recency": Recency(), "random": Random()}
        self.pages: dict[str, np.ndarray] = {}
        self.lookahead = Lookahead(self.config, self.pager, self.table, policies, self.pages_of)
        self.next_page = 1

    def pages_of(self, request: Request, tokens: int) -> np.ndarray:
        return self.pages[request.rid][: pages_spanned(tokens)]

    def allocate(self, count: int) -> np.ndarray:
        pages = np.arange(self.next_page, self.next_page + count, dtype=np.int64)
        self.next_page += count
        self.pager.ledger.allocate(pages)
        return pages

    def prefill(self, rid: str, tokens: int, *, policy: str = "wanted", seed: int = 0, dense: bool = False) -> Request:
        request = Request(rid, 1 + len(self.pages), seed, policy, self.config.budget, dense, tokens=tokens)
        self.pages[rid] = self.allocate(pages_spanned(tokens))
        assert self.pager.hold(rid, self.pages[rid])
        for page in self.pages[rid].tolist():
            place = int(self.pager.v2p[page]) * PAGE_SIZE
            self.pager.keys[0][place : place + PAGE_SIZE] = float(page)
        self.pager.store(self.pages[rid][: pages_complete(tokens)])
        self.lookahead.begin(request)
        return request

    def decode(self, request: Request) -> None:
        """One token more, without a forward pass; the page that it opens is held, as the runtime does."""
        request.tokens += 1
        if request.tokens % PAGE_SIZE == 1:
            self.pages[request.rid] = np.append(self.pages[request.rid], self.allocate(1))
            assert self.pager.hold(request.rid, self.pages[request.rid][-1:])
        if request.tokens % PAGE_SIZE == 0:
            self.pager.store(self.pages[request.rid][-1:])
        self.lookahead.end_step([request])

    def read(self, request: Request) -> list[int]:
        """Positions of the complete pages that attention reads before the tail, found by their content."""
        row = request.row
        places = self.table.pages[row, : int(self.table.count[row])]
        content = [int(self.pager.keys[0][place * PAGE_SIZE, 0, 0]) for place in places.tolist()]
        return [self.pages[request.rid].tolist().index(page) for page in content]

    def held_positions(self, request: Request) -> list[int]:
        held = self.pager.ledger.held_by(request.rid)
        return [position for position, page in enumerate(self.pages[request.rid].tolist()) if page in held]


# --- page arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "spanned", "complete"), [(0, 0, 0), (1, 1, 0), (63, 1, 0), (64, 1, 1), (65, 2, 1)])
def test_page_arithmetic(tokens: int, spanned: int, complete: int) -> None:
    assert (pages_spanned(tokens), pages_complete(tokens)) == (spanned, complete)
    assert align_up(tokens) == spanned * PAGE_SIZE


# --- the first window ------------------------------------------------------------------------------------------------


def test_the_first_window_is_predicted_from_the_prompt() -> None:
    server = Server()
    server.wanted.positions = [3, 6]
    request = server.prefill("a", 10 * PAGE_SIZE + 5)
    # 11 pages, so at most 5: the sink, the two wanted and the growing page; nothing else scored above the threshold.
    assert list(request.history) == [[0, 3, 6]]
    assert request.window == 0
    assert (request.tail_start, int(server.table.tail_start[request.row])) == (10, 10)
    assert server.read(request) == request.positions.tolist() == list(request.history)[-1]


def test_only_resident_pages_and_the_tail_stay_held() -> None:
    server = Server()
    server.wanted.positions = [3, 6]
    request = server.prefill("a", 10 * PAGE_SIZE + 5)
    assert server.held_positions(request) == [*request.positions.tolist(), 10]
    assert server.pager.ledger.held_pages == len(request.positions) + 1
    server.pager.ledger.check()


def test_the_set_is_within_its_budget() -> None:
    server = Server(budget=0.25)
    server.wanted.positions = list(range(16))
    request = server.prefill("a", 16 * PAGE_SIZE)
    assert server.held_positions(request) == request.positions.tolist()
    assert len(request.positions) == 4


def test_no_set_takes_more_than_half_of_the_device_pool() -> None:
    server = Server(budget=0.9)
    server.wanted.positions = list(range(20))
    request = server.prefill("a", 20 * PAGE_SIZE)
    assert len(request.positions) == PHYSICAL // 2


@pytest.mark.parametrize("tokens", [16 * PAGE_SIZE, 16 * PAGE_SIZE + 1, 16 * PAGE_SIZE + 63])
def test_the_tail_starts_after_the_complete_pages(tokens: int) -> None:
    request = Server().prefill("a", tokens)
    assert request.tail_start == 16


# --- the clock -------------------------------------------------------------------------------------------------------


def test_a_set_stays_for_a_window() -> None:
    server = Server()
    request = server.prefill("a", 10 * PAGE_SIZE)
    for step in range(1, 4 * WINDOW + 1):
        server.decode(request)
        assert request.window == step // WINDOW
        assert len(request.history) == request.window + 1
    assert server.lookahead.refreshes == 5
    assert server.wanted.calls == 5


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
        server.lookahead.end_step([first, second])
    assert (first.window, second.window) == (0, 1)


def test_a_new_window_brings_other_pages_in() -> None:
    server = Server()
    server.wanted.positions = [1, 2, 3]
    request = server.prefill("a", 12 * PAGE_SIZE)
    assert set(server.read(request)) >= {0, 1, 2, 3, 11}
    other = server.prefill("b", 17 * PAGE_SIZE, dense=True)  # the device pool is full: what was not held is gone
    assert server.pager.ledger.evictions > 0
    server.pager.forget(other.rid)
    server.wanted.positions = [5, 6, 7]
    for _ in range(WINDOW):
        server.decode(request)
    assert set(server.read(request)) == {0, 5, 6, 7}
    assert server.pager.ledger.recalls > 0
    assert server.held_positions(request) == [*request.positions.tolist(), 12]
    server.pager.ledger.check()


def test_pages_completed_in_a_window_leave_the_tail_with_the_next() -> None:
    server = Server(window=2 * PAGE_SIZE)
    request = server.prefill("a", 8 * PAGE_SIZE)
    for _ in range(2 * PAGE_SIZE - 1):
        server.decode(request)
    assert request.tail_start == 8
    assert set(server.held_positions(request)) >= {8, 9}
    server.decode(request)
    assert request.tail_start == 10
    assert server.held_positions(request) == request.positions.tolist()


# --- dense requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [10 * PAGE_SIZE, 10 * PAGE_SIZE + 5])
def test_a_dense_request_keeps_everything(tokens: int) -> None:
    server = Server()
    request = server.prefill("a", tokens, dense=True)
    for _ in range(3 * WINDOW):
        server.decode(request)
    assert (request.positions.tolist(), request.tail_start) == ([], 0)
    assert server.held_positions(request) == list(range(11))
    assert (int(server.table.count[request.row]), int(server.table.tail_start[request.row])) == (0, 0)
    assert server.wanted.calls == 0


def test_a_request_below_min_context_is_dense_until_a_window_begins_above_it() -> None:
    server = Server(min_context=8 * PAGE_SIZE)
    request = server.prefill("a", 8 * PAGE_SIZE - 1)
    assert (request.tail_start, server.held_positions(request)) == (0, list(range(8)))
    for _ in range(WINDOW - 1):
        server.decode(request)
    assert request.tail_start == 0
    server.decode(request)
    assert request.tokens == 8 * PAGE_SIZE + 3
    assert request.tail_start == 8
    assert server.held_positions(request) == [*request.positions.tolist(), 8]
    assert len(request.positions) < 8


def test_min_context_itself_is_sparse() -> None:
    server = Server(min_context=8 * PAGE_SIZE)
    assert server.prefill("a", 8 * PAGE_SIZE).tail_start == 8
    assert server.prefill("b", 8 * PAGE_SIZE - 1).tail_start == 0


# --- when things go wrong --------------------------------------------------------------------------------------------


def test_a_stall_keeps_the_old_set_for_one_more_window() -> None:
    server = Server()
    server.wanted.positions = [1, 2, 3]
    request = server.prefill("a", 12 * PAGE_SIZE)
    other = server.prefill("b", 17 * PAGE_SIZE, dense=True)
    assert server.pager.unpromised_pages == 24 - len(server.held_positions(request)) - 17
    held = server.pager.ledger.held_by("a")
    assert server.pager.hold("c", server.allocate(server.pager.unpromised_pages - 1))
    old, history = server.read(request), list(request.history)

    server.wanted.positions = [5, 6, 7]
    for _ in range(WINDOW):
        server.decode(request)
    assert (request.stalls, server.lookahead.stalls, request.window) == (1, 1, 1)
    assert server.read(request) == old == request.positions.tolist()
    assert list(request.history) == history
    assert server.pager.ledger.held_by("a") == held | {int(server.pages["a"][12])}
    assert request.tail_start == int(server.table.tail_start[request.row]) == 12
    server.pager.ledger.check()

    server.pager.forget(other.rid)
    for _ in range(WINDOW - 1):
        server.decode(request)
    assert server.read(request) == old
    server.decode(request)
    assert set(server.read(request)) >= {5, 6, 7}
    assert request.stalls == 1


@pytest.mark.parametrize("error", [RuntimeError("no keys"), ValueError("odd"), KeyError("missing")])
def test_a_policy_that_fails_leaves_the_most_recent_pages(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.wanted.error = error
    with caplog.at_level(logging.ERROR, logger="sglang_lsa"):
        request = server.prefill("a", 12 * PAGE_SIZE)
    assert request.positions.tolist() == [0, 7, 8, 9, 10, 11]
    assert server.lookahead.fallbacks == 1
    assert "scoring a with wanted failed; its most recent pages stay" in caplog.text
    server.wanted.error = None
    server.wanted.positions = [4]
    for _ in range(WINDOW):
        server.decode(request)
    assert 4 in request.positions
    assert server.lookahead.fallbacks == 1


def test_a_policy_that_does_not_exist_leaves_the_most_recent_pages() -> None:
    server = Server()
    request = server.prefill("a", 12 * PAGE_SIZE, policy="unheard of")
    assert request.positions.tolist() == [0, 7, 8, 9, 10, 11]
    assert server.lookahead.fallbacks == 1


# --- policies --------------------------------------------------------------------------------------------------------


def test_recency_prefers_later_pages() -> None:
    scores = Recency().score(Request("a", 1, 0, "recency", 0.5, False), np.arange(5))
    assert (np.diff(scores) > 0).all()
    assert (scores > 0).all()
    assert len(Recency().score(Request("a", 1, 0, "recency", 0.5, False), np.arange(0))) == 0


def test_random_pages_are_those_of_the_prompt_and_the_window() -> None:
    def scores(seed: int, window: int) -> list[float]:
        request = Request("a", 1, seed, "random", 0.5, False, window=window)
        return Random().score(request, np.arange(8)).tolist()

    assert scores(7, 0) == scores(7, 0)
    assert scores(7, 0) != scores(7, 1)
    assert scores(7, 0) != scores(8, 0)
    assert len(scores(7, -1)) == 8
