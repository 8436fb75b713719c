"""The window clock: when resident sets change, and what is held for them."""

from __future__ import annotations

import numpy as np
import pytest
from lookahead_server import LAG, LEAD, LONG, PHYSICAL, WINDOW, Server, fail

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.choose import choose
from sglang_lsa.engine.selection import Watched
from sglang_lsa.memory.pages import align_up, pages_complete, pages_spanned

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
