"""The ledger: virtual pages, who holds them, and what the host has; examples of every operation and error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ledgers import cached, full_of_held_pages, held, ledger_with, on_device, pairs, state, warm

from sglang_lsa.memory.ledger import Ledger, LedgerError

# --- construction and virtual pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("virtual", "physical"), [(3, 4), (4, 0), (0, 0)])
def test_sizes_that_cannot_work_are_refused(virtual: int, physical: int) -> None:
    with pytest.raises(ValueError, match=f"{virtual} virtual over {physical} physical pages: the host mirror must"):
        Ledger(virtual, physical)


def test_a_new_ledger_is_empty() -> None:
    ledger = Ledger(8, 4)
    ledger.check()
    assert (ledger.allocated_pages, ledger.device_pages, ledger.host_pages, ledger.held_pages) == (0, 0, 0, 0)
    assert ledger.obtainable_pages == 4
    assert ledger.holders() == []


def test_allocated_pages_have_no_place_yet() -> None:
    ledger = ledger_with(1, 5)
    assert ledger.allocated_pages == 2
    assert on_device(ledger) == set()
    assert not ledger.is_mirrored([1, 5]).any()


@pytest.mark.parametrize("again", [[1], [2, 1], [0], [2, 2]], ids=["same", "among others", "padding", "one call"])
def test_allocating_twice_is_an_error(again: list[int]) -> None:
    ledger = ledger_with(1)
    with pytest.raises(LedgerError, match=f"allocated twice: .*{again[-1]}"):
        ledger.allocate(again)


def test_releasing_what_is_not_allocated_is_an_error() -> None:
    ledger = ledger_with(1)
    with pytest.raises(LedgerError, match=r"released but not allocated: \[2\]"):
        ledger.release([1, 2])


def test_releasing_what_is_held_is_an_error() -> None:
    ledger = ledger_with(1, 2)
    held(ledger, "a", 2)
    with pytest.raises(LedgerError, match=r"released while held: \[2\]"):
        ledger.release([1, 2])


def test_releasing_a_page_twice_in_one_call_is_an_error() -> None:
    """Else the padding page would become a free device page, and be handed out."""
    ledger = ledger_with(1)
    cached(ledger, 1)
    with pytest.raises(LedgerError):
        ledger.release([1, 1])
    ledger.check()


def test_released_pages_leave_device_and_mirror() -> None:
    ledger = ledger_with(1, 2)
    cached(ledger, 1, 2)
    ledger.release([1])
    ledger.check()
    assert on_device(ledger) == {2}
    assert ledger.is_mirrored([1, 2]).tolist() == [False, True]
    assert ledger.obtainable_pages == 4


def test_a_page_allocated_again_has_no_content() -> None:
    ledger = ledger_with(1)
    cached(ledger, 1)
    ledger.release([1])
    ledger.allocate([1])
    plan = held(ledger, "a", 1)
    assert pairs(plan.recall) == {}
    assert list(pairs(plan.fresh)) == [1]


# --- hold and drop ---------------------------------------------------------------------------------------------------


def test_hold_gives_fresh_pages_distinct_places() -> None:
    ledger = ledger_with(1, 2, 3)
    plan = held(ledger, "a", 1, 2, 3)
    assert sorted(pairs(plan.fresh)) == [1, 2, 3]
    assert len(set(pairs(plan.fresh).values())) == 3
    assert all(1 <= p <= 4 for p in pairs(plan.fresh).values())
    assert ledger.held_by("a") == {1, 2, 3}
    assert ledger.is_held([1, 4]).tolist() == [True, False]


def test_hold_adds_to_what_is_held() -> None:
    ledger = ledger_with(1, 2, 3)
    held(ledger, "a", 1, 2)
    plan = held(ledger, "a", 2, 3, 3)
    assert list(pairs(plan.fresh)) == [3]
    assert ledger.held_by("a") == {1, 2, 3}
    assert ledger.held_pages == 3
    ledger.check()


@pytest.mark.parametrize("pages", [[2], [1, 2], [0]], ids=["never allocated", "among others", "padding"])
def test_holding_what_is_not_allocated_is_an_error(pages: list[int]) -> None:
    ledger = ledger_with(1)
    before = state(ledger)
    with pytest.raises(LedgerError, match=rf"held but not allocated: \[{pages[-1]}\]"):
        ledger.hold("a", pages)
    assert state(ledger) == before


def test_holding_nothing_makes_no_holder() -> None:
    ledger = ledger_with(1)
    plan = held(ledger, "a")
    assert pairs(plan.recall) == pairs(plan.fresh) == {}
    assert ledger.holders() == []
    ledger.check()


def test_shared_pages_count_once() -> None:
    ledger = ledger_with(1, 2, 3)
    held(ledger, "a", 1, 2)
    plan = held(ledger, "b", 2, 3)
    assert list(pairs(plan.fresh)) == [3]
    assert ledger.held_pages == ledger.device_pages == 3
    assert ledger.holders() == ["a", "b"]


def test_a_shared_page_stays_held_until_its_last_holder_drops_it() -> None:
    ledger = ledger_with(1)
    held(ledger, "a", 1)
    held(ledger, "b", 1)
    ledger.drop("a")
    assert ledger.is_held([1]).all()
    ledger.drop("b")
    assert not ledger.is_held([1]).any()
    assert on_device(ledger) == {1}


def test_drop_some_pages() -> None:
    ledger = ledger_with(1, 2, 3)
    held(ledger, "a", 1, 2, 3)
    ledger.drop("a", {1, 3, 7})
    assert ledger.held_by("a") == {2}
    ledger.drop("a", [2])
    assert ledger.holders() == []
    ledger.check()


def test_a_page_goes_with_the_last_of_its_holders() -> None:
    """Known before anybody lets go."""
    ledger = ledger_with(1, 2, 3, 4, 5, physical=5)
    for holder, pages in {"a": [1, 2, 3], "b": [1, 2], "c": [2, 4, 5]}.items():
        ledger.hold(holder, pages)
    mine = {name: np.array(sorted(ledger.held_by(name))) for name in "abc"}
    assert list(ledger.letting_go([mine["a"], mine["b"], mine["c"]])) == [1, 2, 5]
    assert list(ledger.letting_go([mine["b"], mine["c"], mine["a"]])) == [0, 2, 5]
    assert list(ledger.letting_go([mine["c"][:1], np.array([4])])) == [0, 1]
    assert ledger.held_pages == 5 and list(ledger.letting_go([])) == []
    ledger.check()


def test_dropping_what_is_not_held_is_ignored() -> None:
    ledger = ledger_with(1, 2)
    held(ledger, "a", 1)
    before = state(ledger)
    ledger.drop("nobody")
    ledger.drop("a", [2])
    ledger.drop("a", [])
    assert state(ledger) == before


def test_retain_keeps_exactly_the_given_pages() -> None:
    ledger = ledger_with(1, 2, 3, 4)
    held(ledger, "a", 1, 2, 3, 4)
    ledger.retain("a", {2, 4})
    assert ledger.held_by("a") == {2, 4}
    assert on_device(ledger) == {1, 2, 3, 4}, "the others stay until their place is wanted"
    ledger.check()


def test_retain_leaves_the_holds_of_others_alone() -> None:
    ledger = ledger_with(1, 2, 3)
    held(ledger, "a", 1, 2)
    held(ledger, "b", 2, 3)
    ledger.retain("a", [1])
    assert ledger.held_by("b") == {2, 3}
    assert ledger.is_held([1, 2, 3]).all()
    ledger.check()


def test_retaining_what_is_not_held_is_ignored() -> None:
    ledger = ledger_with(1, 2, 3)
    held(ledger, "a", 1, 2)
    before = state(ledger)
    ledger.retain("nobody", [1])
    ledger.retain("a", [1, 2])
    ledger.retain("a", (page for page in (3, 2, 1, 1, 7)))
    assert state(ledger) == before


@pytest.mark.parametrize("pages", [[], [3, 4], np.zeros(0, dtype=np.int64)], ids=["none", "others", "no ids"])
def test_a_holder_that_retains_nothing_is_forgotten(pages: Any) -> None:
    ledger = ledger_with(1, 2, 3)
    held(ledger, "a", 1, 2)
    ledger.retain("a", pages)
    assert ledger.holders() == []
    assert not ledger.is_held([1, 2]).any()
    ledger.check()


def test_recall_names_the_pages_whose_only_copy_is_in_the_mirror() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5)
    cached(ledger, 1, 2, 3, 4)
    held(ledger, "a", 5)
    assert on_device(ledger) == {2, 3, 4, 5}
    plan = held(ledger, "b", 1, 2)
    assert list(pairs(plan.recall)) == [1]
    assert pairs(plan.recall)[1] == ledger.v2p[1] > 0
    assert pairs(plan.fresh) == {}
    assert (ledger.recalls, ledger.evictions) == (1, 2)


def test_no_more_pages_are_evicted_than_needed() -> None:
    ledger = ledger_with(1, 2, 3, 4)
    cached(ledger, 1, 2)
    held(ledger, "a", 3, 4)
    assert ledger.evictions == 0
    assert on_device(ledger) == {1, 2, 3, 4}


def test_least_recently_used_pages_are_evicted_first() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5, 6)
    cached(ledger, 3, 1, 4, 2)
    cached(ledger, 3)  # used again
    held(ledger, "a", 5)
    assert on_device(ledger) == {3, 4, 2, 5}
    held(ledger, "a", 6)
    assert on_device(ledger) == {3, 2, 5, 6}


def test_pages_asked_for_are_not_evicted_to_make_room_for_each_other() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5)
    cached(ledger, 1, 2, 3, 4)
    held(ledger, "a", 1, 5)
    assert on_device(ledger) == {1, 3, 4, 5}


@pytest.mark.parametrize(
    ("selected", "order"),
    [
        pytest.param([], [3, 1, 4, 2], id="cold: the least recently used first"),
        pytest.param([3], [1, 4, 2, 3], id="one is hot"),
        pytest.param([3, 1, 4, 2], [3, 1, 4, 2], id="the coldest first"),
        pytest.param([2, 4, 1, 3], [2, 4, 1, 3], id="whatever was used last"),
        pytest.param([1, 1, 4], [3, 2, 4, 1], id="cold ones first"),
    ],
)
def test_the_coldest_pages_are_evicted_first(selected: list[int], order: list[int]) -> None:
    ledger = ledger_with(1, 2, 3, 4, 5, 6, 7, 8)
    cached(ledger, 3, 1, 4, 2)
    warm(ledger, *selected)
    for page, evicted in zip((5, 6, 7, 8), order, strict=True):
        before = on_device(ledger)
        held(ledger, "a", page)
        assert before - on_device(ledger) == {evicted}


def test_several_victims_are_the_coldest_together() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5, 6)
    cached(ledger, 3, 1, 4, 2)
    warm(ledger, 1, 3)
    held(ledger, "a", 5, 6)
    assert on_device(ledger) == {1, 3, 5, 6}


def test_of_equally_hot_and_recent_pages_the_first_goes() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5)
    held(ledger, "a", 4, 2, 3, 1)
    ledger.mirrored([1, 2, 3, 4])
    ledger.drop("a")
    held(ledger, "b", 5)
    assert on_device(ledger) == {2, 3, 4, 5}


def test_heat_is_of_the_content() -> None:
    """A page handed out again is cold; one that replaces another goes on with the larger of both heats."""
    ledger = ledger_with(1, 2, 3, 4)
    cached(ledger, 1, 2, 3, 4)
    warm(ledger, 1, 2, 2, 3)
    heat = ledger.heat.values.copy()
    ledger.release([1])
    ledger.allocate([1])
    assert ledger.heat.values.tolist() == [0, 0, *heat[2:].tolist()]
    ledger.substitute("a", [2, 4, 3], [3, 1, 3])
    assert ledger.heat.values[1:5].tolist() == [0, 0, heat[2], 0]


def test_a_reset_ledger_is_cold() -> None:
    ledger = ledger_with(1)
    warm(ledger, 1)
    ledger.reset()
    ledger.allocate([1, 2])
    assert not ledger.heat.values.any()
    assert ledger.heat.hottest(np.array([1, 2]), 9).tolist() == []


def full_of_unmirrored_pages() -> Ledger:
    ledger = ledger_with(1, 2, 3, 4, 5)
    held(ledger, "a", 1, 2, 3, 4)
    ledger.drop("a")
    return ledger


def full_of_pages_in_flight() -> Ledger:
    ledger = full_of_held_pages()
    ledger.forward_started()
    ledger.drop("a")
    return ledger


def one_page_short() -> Ledger:
    ledger = ledger_with(1, 2, 3, 4, 5, 6)
    held(ledger, "a", 1, 2, 3)
    cached(ledger, 4)
    return ledger


@pytest.mark.parametrize(
    ("make", "pages"),
    [
        (full_of_held_pages, [5]),
        (full_of_unmirrored_pages, [5]),
        (full_of_pages_in_flight, [5]),
        (one_page_short, [5, 6]),
        (one_page_short, [4, 5, 6]),
        (full_of_held_pages, [1, 5]),
    ],
)
def test_hold_is_all_or_nothing(make: Any, pages: list[int]) -> None:
    ledger = make()
    before = state(ledger)
    assert ledger.hold("b", pages) is None
    assert state(ledger) == before
    assert ledger.hold("a", pages) is None
    assert state(ledger) == before
    ledger.check()


def test_an_unmirrored_page_is_never_evicted() -> None:
    ledger = full_of_unmirrored_pages()
    assert ledger.obtainable_pages == 0
    ledger.mirrored([3])
    assert ledger.obtainable_pages == 1
    held(ledger, "b", 5)
    assert on_device(ledger) == {1, 2, 4, 5}


# --- the mirror ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [0, 2, 3], ids=["padding", "never held", "not allocated"])
def test_mirroring_without_a_device_copy_is_an_error(page: int) -> None:
    ledger = ledger_with(1, 2)
    held(ledger, "a", 1)
    with pytest.raises(LedgerError, match=rf"mirrored without a device copy: \[{page}\]"):
        ledger.mirrored([1, page])
    assert not ledger.is_mirrored([1]).any()


def test_mirrored_pages_are_counted_on_the_host() -> None:
    ledger = ledger_with(1, 2)
    held(ledger, "a", 1, 2)
    ledger.mirrored([2])
    ledger.mirrored([2])
    assert ledger.host_pages == 1
    assert ledger.is_mirrored([1, 2]).tolist() == [False, True]
