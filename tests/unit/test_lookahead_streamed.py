"""The first set of a request that cannot be read whole, and windows of several requests that end in the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from lookahead_server import LAG, LEAD, LONG, PHYSICAL, STAGES, Server, fail, given_sets, reads
from promises import owed

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.chooser import Chooser
from sglang_lsa.engine.grouping import Company
from sglang_lsa.engine.request import Refresh, Request, State

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


def test_a_first_set_that_is_given_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names its set itself, so none of it can be left out, and there will be no room for it on this device."""
    server, waited = Server(window=LONG), []
    request = server.prefill("a", PROMPT, promised=1, sets=given_sets(f"{PROMPT + 9}:12:0,1,2"))
    server.hold("others", server.allocate(PHYSICAL - 2))
    monkeypatch.setattr(server.pager, "settle", lambda: waited.append(server.lookahead.counts.stalls))
    server.before_decode(request)
    server.lookahead.complete_first(["a"])
    assert (server.held_positions(request), request.resident.next) == ([12], None)
    assert waited == []


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
    asked = Chooser.ask

    def ask_b(self: Chooser, request: Request, new: Refresh) -> object:
        if request.rid == "a":
            raise RuntimeError("no set")
        return asked(self, request, new)

    monkeypatch.setattr(Chooser, "ask", ask_b)
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
