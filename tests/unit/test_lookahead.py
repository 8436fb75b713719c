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
from sglang_lsa.radix_ext.transfer import Finished, HostTransfer
from sglang_lsa.resident_table import ResidentTable

PHYSICAL, VIRTUAL = 24, 64
WINDOW = 4


class Wanted:
    """A policy that wants certain positions; or fails."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.error: Exception | None = None
        self.calls = 0

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray | torch.Tensor:
        self.calls += 1
        if self.error is not None:
            raise self.error
        scores = np.zeros(len(pages))
        scores[[position for position in self.positions if position < len(pages)]] = 1.0
        return scores


class Queued(Wanted):
    """The same, but its scores are computed when the test says so, as those of a GPU are."""

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        self.result = torch.from_numpy(super().score(request, pages))
        self.scores = torch.full_like(self.result, float("nan"))
        return self.scores

    def compute(self) -> None:
        self.scores.copy_(self.result)


class LateTransfer(HostTransfer):
    """As on a GPU, recalls only begin when they are asked for; they end when the test says so."""

    def __init__(self, pager: Pager) -> None:
        super().__init__(pager.keys, pager.values, pager.mirror.pages)
        self.on_their_way: list[tuple[np.ndarray, np.ndarray, Finished]] = []

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> None:
        self.on_their_way.append((physical, virtual, finished))

    def arrive(self) -> None:
        while self.on_their_way:
            super().recall(*self.on_their_way.pop(0))

    def wait(self) -> None:
        self.arrive()


class Server:
    """A lookahead over a real pager. Requests own runs of virtual pages; content is the number of the page."""

    def __init__(self, lead: int = 0, lag: int = 0, **options: object) -> None:
        defaults = {"budget": 0.5, "min_pages": 1, "window": WINDOW, "sink_pages": 1, "recent_pages": 1}
        self.config = LSAConfig.from_mapping({**defaults, "min_context": 4 * PAGE_SIZE, **options})
        keys, values = ([torch.zeros((PHYSICAL + 1) * PAGE_SIZE, 1, 2)] for _ in range(2))
        self.pager = Pager(keys, values, VIRTUAL, PAGE_SIZE)
        self.table = ResidentTable(16, 32)
        self.wanted = Wanted()
        self.queued = Queued()
        policies: dict[str, Policy] = {
            "wanted": self.wanted,
            "queued": self.queued,
            "recency": Recency(),
            "random": Random(),
        }
        self.lookahead = Lookahead(self.config, self.pager, self.table, policies, lead, lag)
        self.requests = 0
        self.next_page = 1

    def allocate(self, count: int) -> np.ndarray:
        pages = np.arange(self.next_page, self.next_page + count, dtype=np.int64)
        self.next_page += count
        self.pager.ledger.allocate(pages)
        return pages

    def prefill(self, rid: str, tokens: int, *, policy: str = "wanted", seed: int = 0, dense: bool = False) -> Request:
        self.requests += 1
        request = Request(rid, self.requests, seed, policy, self.config.budget, dense, tokens=tokens)
        request.pages = self.allocate(pages_spanned(tokens))
        assert self.pager.hold(rid, request.pages)
        for page in request.pages.tolist():
            place = int(self.pager.v2p[page]) * PAGE_SIZE
            self.pager.keys[0][place : place + PAGE_SIZE] = float(page)
        self.pager.store(request.pages[: pages_complete(tokens)])
        self.lookahead.begin(request)
        return request

    def decode(self, request: Request) -> None:
        """One token more, without a forward pass; the page that it opens is held, as the runtime does."""
        self.before_decode(request)
        self.after_decode(request)

    def before_decode(self, request: Request) -> None:
        request.tokens += 1
        if request.tokens % PAGE_SIZE == 1:
            request.pages = np.append(request.pages, self.allocate(1))
            assert self.pager.hold(request.rid, request.pages[-1:])
        self.lookahead.begin_step()

    def after_decode(self, request: Request) -> None:
        if request.tokens % PAGE_SIZE == 0:
            self.pager.store(request.pages[-1:])
        self.lookahead.refresh(self.lookahead.end_step([request]))

    def read(self, request: Request) -> list[int]:
        """Positions of the complete pages that attention reads before the tail, found by their content."""
        row = request.row
        places = self.table.pages[row, : int(self.table.count[row])]
        content = [int(self.pager.keys[0][place * PAGE_SIZE, 0, 0]) for place in places.tolist()]
        return [request.pages.tolist().index(page) for page in content]

    def held_positions(self, request: Request) -> list[int]:
        held = self.pager.ledger.held_by(request.rid)
        return [position for position, page in enumerate(request.pages.tolist()) if page in held]


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


def test_min_pages_does_not_ask_for_more_than_half_of_the_device_pool() -> None:
    server = Server(budget=0.1, min_pages=18)
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
        server.lookahead.refresh(server.lookahead.end_step([first, second]))
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
    assert server.pager.ledger.held_by("a") == held | {int(request.pages[12])}
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


# --- as on a GPU: a refresh takes several steps -----------------------------------------------------------------------


LONG, LEAD, LAG = 8, 5, 2
"""Decode steps of a window; steps before it at which a refresh starts; steps after which its scores are read."""
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
        assert self.read(self.a) == [position for position in OLD if position < self.a.tail_start]
        other = self.prefill("b", 17 * PAGE_SIZE, dense=True)
        self.gone(other)
        assert not self.pager.v2p[self.a.pages[[5, 6, 7]]].any()
        self.transfer = self.pager.transfer = LateTransfer(self.pager)
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
    assert (request.window, request.tail_start, list(request.history)) == (0, 0, [])
    assert server.held_positions(request) == list(range(11))
    server.queued.compute()
    server.before_decode(request)
    assert list(request.history) == [[0, 3, 6]]
    assert server.read(request) == [0, 3, 6]
    assert server.held_positions(request) == [0, 3, 6, 10]
    assert (int(server.table.tail_start[request.row]), request.stalls) == (10, 0)
    assert server.lookahead.on_their_way == {}


def test_other_passes_count_for_the_lag() -> None:
    """Also a prefill of somebody else tells that the pass whose queries are scored is done."""
    server = Server(LEAD, LAG, window=LONG)
    request = server.prefill("a", 10 * PAGE_SIZE)
    server.lookahead.begin_step()
    assert request.tail_start == 0
    server.lookahead.begin_step()
    assert request.tail_start == 10


def test_the_first_windows_of_a_gpu_are_spread_over_what_leaves_time_to_prefetch() -> None:
    server = Server(LEAD, LAG, window=LONG)
    lengths = [server.prefill(f"r{seed}", PAGE_SIZE, seed=seed).steps_left for seed in range(6)]
    assert lengths == [8, 7, 6, 8, 7, 6]
    assert min(lengths) > LEAD


def test_a_refresh_starts_before_its_window() -> None:
    server = Overlapped()
    a = server.a
    assert (a.window, server.wanted.calls) == (0, 1)
    server.begin(LONG - LEAD)
    assert (a.window, server.wanted.calls, a.next) == (0, 1, None)
    server.end()
    assert (a.window, server.wanted.calls) == (1, 2)
    assert a.next is not None and a.next.positions is None
    assert server.lookahead.on_their_way == {"a": a}


def test_scores_are_read_when_their_pass_is_done() -> None:
    """Exactly ``lag`` passes later: before, there is nothing to read; later, pages would come later."""
    server = Overlapped("queued")
    server.begin(LONG - LEAD)
    server.end()
    for _ in range(LAG - 1):
        server.begin_next()
        assert server.a.next is not None and server.a.next.positions is None
        server.end()
    server.queued.compute()
    assert server.transfer.on_their_way == []
    server.begin_next()
    assert server.a.next is not None and server.a.next.positions is not None
    assert server.a.next.positions.tolist() == NEW
    (pages,) = [virtual.tolist() for _, virtual, _ in server.transfer.on_their_way]
    assert pages == server.a.pages[[5, 6, 7]].tolist()


def test_pages_arrive_while_the_old_set_is_read() -> None:
    server = Overlapped()
    a = server.a
    server.begin(LONG - LEAD + LAG)
    for step in range(LONG - LEAD + LAG, LONG + 1):
        server.begin(step)
        assert server.read(a) == a.positions.tolist() == OLD
        assert server.held_positions(a) == sorted({*OLD, *NEW, 12})
        server.pager.ledger.check()
        server.transfer.arrive()
    server.begin(LONG + 1)
    assert server.read(a) == a.positions.tolist() == NEW
    assert server.held_positions(a) == [*NEW, 12]
    assert list(a.history) == [OLD, NEW]
    assert (a.stalls, server.lookahead.stalls, server.pager.late_pages) == (0, 0, 0)
    assert server.transfer.recalled_pages == 3
    server.pager.ledger.check()


@pytest.mark.parametrize("late", [1, 2, 4])
def test_late_pages_leave_the_old_set_until_they_are_there(late: int) -> None:
    server = Overlapped()
    a = server.a
    for step in range(LONG + 1, LONG + 1 + late):
        server.begin(step)
        assert server.read(a) == a.positions.tolist() == OLD
        assert (a.stalls, server.lookahead.stalls, server.pager.late_pages) == (1, 1, 3)
        assert server.held_positions(a) == sorted({*OLD, *NEW, 12})
    server.transfer.arrive()
    assert server.read(a) == OLD
    server.begin(LONG + 1 + late)
    assert server.read(a) == a.positions.tolist() == NEW
    assert server.held_positions(a) == [*NEW, 12]
    assert (a.stalls, a.window, list(a.history)) == (1, 1, [OLD, NEW])
    server.pager.ledger.check()


@pytest.mark.parametrize("late", [0, 1, 2, 4])
def test_a_late_set_does_not_move_the_next_window(late: int) -> None:
    server = Overlapped()
    server.begin(LONG + late)
    server.transfer.arrive()
    server.begin(max(LONG + late + 1, 2 * LONG - LEAD))  # a set that is very late leaves the next one less time
    assert (server.a.window, server.wanted.calls) == (1, 2)
    server.wanted.positions = [5, 9]
    server.end()
    assert (server.a.window, server.wanted.calls) == (2, 3)
    server.begin(2 * LONG)
    assert server.read(server.a) == NEW
    server.transfer.arrive()
    server.begin(2 * LONG + 1)
    assert server.read(server.a) == [0, 5, 9]


def test_a_set_that_is_more_than_a_window_late() -> None:
    """Nothing is predicted meanwhile; afterwards the next refresh starts at once."""
    server = Overlapped()
    server.begin(3 * LONG)
    assert (server.a.window, server.a.stalls, server.wanted.calls) == (1, 1, 2)
    server.transfer.arrive()
    server.begin(3 * LONG + 1)
    assert server.read(server.a) == NEW
    server.end()
    assert server.a.window == 2


def test_which_pages_are_read_does_not_depend_on_when_they_arrive() -> None:
    """As long as they come within the window."""

    def history(delay: int) -> list[list[int]]:
        server = Overlapped()
        waiting = 0
        while server.steps < 5 * LONG:
            server.wanted.positions = [1 + (3 * server.a.window + place) % 11 for place in range(3)]
            server.begin(server.steps + 1)
            waiting = waiting + 1 if server.transfer.on_their_way else 0
            if waiting > delay:
                server.transfer.arrive()
        return list(server.a.history)

    expected = history(0)
    assert len(expected) == 5
    for delay in (1, 2, 3, 4, 5, 6):
        assert history(delay) == expected


def test_pages_opened_during_a_refresh_belong_to_the_tail() -> None:
    server = Overlapped(tokens=12 * PAGE_SIZE - 6)
    a = server.a
    assert a.tail_start == 11
    server.begin(LONG - LEAD + LAG)
    assert (len(a.pages), a.tokens) == (12, 12 * PAGE_SIZE - 1)
    server.transfer.arrive()
    server.begin(LONG + 1)
    assert len(a.pages) == 13
    assert (server.read(a), a.tail_start) == (NEW, 11)
    assert server.held_positions(a) == [*NEW, 11, 12]


@pytest.mark.parametrize("step", [LONG - LEAD + 1, LONG - LEAD + LAG, LONG, LONG + 2])
def test_a_request_forgotten_during_a_refresh_leaves_nothing(step: int) -> None:
    server = Overlapped()
    server.begin(step)
    assert server.lookahead.on_their_way == {"a": server.a}
    table = server.table.table.clone()
    server.gone(server.a)
    server.pager.ledger.release(server.a.pages)
    assert server.lookahead.on_their_way == {}
    assert server.pager.ledger.holders() == []
    for _ in range(LONG):
        server.lookahead.begin_step()
    server.pager.ledger.check()
    server.transfer.arrive()
    server.pager.ledger.check()
    assert server.pager.unpromised_pages == PHYSICAL
    assert torch.equal(server.table.table, table)


def test_a_set_without_room_costs_its_window_and_no_more() -> None:
    server = Overlapped()
    a = server.a
    others = server.allocate(server.pager.unpromised_pages - 1)
    assert server.pager.hold("c", others)
    server.begin(LONG - LEAD // 2)
    assert (a.stalls, a.next is None) == (0, False), "there is time to try again"
    server.begin(LONG - LEAD // 2 + 1)
    assert (a.stalls, server.lookahead.stalls, a.window) == (1, 1, 1)
    assert server.lookahead.on_their_way == {}
    assert server.held_positions(a) == [*OLD, 12]
    server.pager.forget("c")
    server.pager.ledger.release(others)
    for step in range(LONG - LEAD // 2 + 1, 2 * LONG + 1):
        server.begin(step)
        assert server.read(a) == OLD
        server.transfer.arrive()
    assert server.wanted.calls == 3
    server.begin(2 * LONG + 1)
    assert server.read(a) == NEW
    assert (a.stalls, list(a.history), server.pager.late_pages) == (1, [OLD, NEW], 0)


def test_pages_replaced_during_a_refresh_are_replaced_in_the_new_set() -> None:
    """Another request put the same tokens into the radix tree meanwhile; its page is used from then on."""
    server = Overlapped()
    a = server.a
    server.begin(LONG - LEAD + LAG)
    (tree,) = server.allocate(1).tolist()
    old = int(a.pages[6])
    server.pager.mirror.pages[tree] = float(old)  # the same content
    place = int(server.pager.v2p[old])
    server.pager.ledger.substitute("a", [old], [tree])
    a.pages = np.where(a.pages == old, tree, a.pages)
    server.pager.ledger.release([old])
    server.transfer.arrive()
    server.begin(LONG + 1)
    assert int(server.pager.v2p[tree]) == place
    assert server.table.pages[a.row, :4].tolist() == server.pager.v2p[a.pages[NEW]].tolist()
    assert server.held_positions(a) == [*NEW, 12]
    server.pager.ledger.check()


def test_a_policy_that_fails_is_not_waited_for_any_longer() -> None:
    server = Overlapped()
    server.wanted.error = RuntimeError("no keys")
    server.begin(LONG)
    server.transfer.arrive()
    server.begin(LONG + 1)
    assert server.lookahead.fallbacks == 1
    assert server.a.positions.tolist() == [0, 8, 9, 10, 11]
    assert server.a.stalls == 0


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
