"""Refreshes that take several steps, as on a GPU: begun before their window, behind a forward pass."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from lookahead_server import LAG, LEAD, LONG, NEW, OLD, PHYSICAL, Overlapped, Server

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.request import Asked, Request, State
from sglang_lsa.engine.window import Clock


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


@pytest.mark.parametrize(("window", "lead", "beat"), [(64, 16, 16), (64, 0, 16), (64, 48, 16), (8, 2, 2)])
def test_windows_that_keep_time_begin_together(window: int, lead: int, beat: int) -> None:
    """However many steps apart their prompts were done: in a few steps of each window's length, spread over those that
    leave time to prefetch."""
    clock = Clock(window, lead)
    clock.keep_time()
    assert clock.beat == beat
    began: dict[int, list[int]] = {}
    running: dict[int, Request] = {}
    for step in range(72 + 4 * window):
        if step % 3 == 0 and len(running) < 24:
            seed = len(running)
            running[seed] = Request(str(seed), seed, Asked("wanted", 0.5, seed=seed), tokens=640, prompt_tokens=640)
            clock.begin(running[seed])
        for seed, request in running.items():
            if request.steps_left <= 0:
                request.window += 1
                clock.next_window(request)
                assert request.steps_left > lead
                began.setdefault(seed, []).append(clock.decoded)
        clock.end_step(running.values())
    later = [steps[1:] for steps in began.values()]
    assert all(step % beat == 0 for steps in later for step in steps)
    assert all(after - before == window for steps in later for before, after in pairwise(steps))
    assert len({steps[0] % window for steps in later}) >= (window - lead) // beat


@pytest.mark.parametrize("decoded", range(16))
def test_who_is_out_of_time_is_in_time_from_the_next_window_on(decoded: int) -> None:
    """As a request that read everything for some windows, until pressure lets its first set begin at once."""
    clock = Clock(64, 16, decoded=decoded)
    clock.keep_time()
    request = Request("late", 0, Asked("wanted", 0.5, seed=5), tokens=640, prompt_tokens=640, window=3)
    clock.next_window(request)
    assert (clock.decoded + request.steps_left) % clock.beat == 0
    assert 64 - clock.beat < request.steps_left <= 64
    clock.beat, request.steps_left = 1, 0
    clock.next_window(request)
    assert request.steps_left == 64, "nobody keeps time"


@pytest.mark.parametrize(("window", "lead"), [(50, 3), (64, 60), (3, 0)])
def test_windows_without_room_for_a_beat_keep_their_own_time(window: int, lead: int) -> None:
    clock = Clock(window, lead)
    clock.keep_time()
    assert clock.beat == 1


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


def test_it_is_busy_before_a_step_that_takes_a_refresh_further_and_before_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels of a step that is not busy may be queued on any stream: there are none."""
    server = Server(LEAD, LAG, window=LONG)
    lookahead, seen = server.lookahead, list[tuple[bool, bool]]()
    begin_step, advance = lookahead.begin_step, lookahead.refresher._advance
    advanced: list[Request] = []

    def begun() -> None:
        busy = lookahead.busy
        advanced.clear()
        begin_step()
        seen.append((busy, bool(advanced)))

    def counted(requests: list[Request]) -> None:
        advanced.extend(requests)
        advance(requests)

    monkeypatch.setattr(lookahead, "begin_step", begun)
    monkeypatch.setattr(lookahead.refresher, "_advance", counted)
    requests = [server.prefill(f"r{seed}", 8 * PAGE_SIZE, seed=seed) for seed in range(2)]
    for _ in range(5 * LONG):
        for request in requests:
            server.decode(request)
    assert all(busy == did for busy, did in seen)
    assert {busy for busy, _ in seen} == {True, False}
