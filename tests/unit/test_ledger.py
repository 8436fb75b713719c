"""The ledger: examples of every operation and error, and a state machine against an independent model with bytes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_lsa.memory.heat import HALF_LIFE
from sglang_lsa.memory.ledger import Ledger, LedgerError, Plan


def ledger_with(*pages: int, virtual: int = 8, physical: int = 4) -> Ledger:
    """A ledger whose ``pages`` are allocated."""
    ledger = Ledger(virtual, physical)
    ledger.allocate(pages)
    return ledger


def cached(ledger: Ledger, *pages: int) -> None:
    """Bring ``pages`` in, one after the other, mirror them, and let them go: they stay, held by nobody."""
    for page in pages:
        held(ledger, "passer-by", page)
        ledger.mirrored([page])
        ledger.drop("passer-by")


def held(ledger: Ledger, holder: str, *pages: int) -> Plan:
    plan = ledger.hold(holder, pages)
    assert plan is not None
    return plan


def on_device(ledger: Ledger) -> set[int]:
    return set(np.flatnonzero(ledger.v2p).tolist())


def state(ledger: Ledger) -> dict[str, Any]:
    """Everything the ledger knows, comparable."""
    values = copy.deepcopy(vars(ledger))
    values["heat"] = vars(values["heat"])["values"]
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def pairs(side: tuple[np.ndarray, np.ndarray]) -> dict[int, int]:
    return dict(zip(side[0].tolist(), side[1].tolist(), strict=True))


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


def warm(ledger: Ledger, *pages: int) -> None:
    """Resident sets name these pages, one set after the other: the last is the hottest."""
    for page in pages:
        ledger.heat.select(np.array([page]))


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


def full_of_held_pages() -> Ledger:
    ledger = ledger_with(1, 2, 3, 4, 5)
    held(ledger, "a", 1, 2, 3, 4)
    ledger.mirrored([1, 2, 3, 4])
    return ledger


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


# --- what is worth bringing in ahead of time -------------------------------------------------------------------------


def worth_fetching(ledger: Ledger, *pages: int) -> list[int]:
    """Also checks that bringing them in displaces what was compared, and nothing else."""
    wanted = ledger.worth_fetching(np.array(pages, dtype=np.int64)).tolist()
    probe = copy.deepcopy(ledger)
    before = on_device(probe)
    held(probe, "probe", *wanted)
    lost = before - on_device(probe)
    assert len(lost) == max(0, len(wanted) - (4 - len(before)))
    heat = ledger.heat.values
    assert all(heat[page] < heat[wanted].max() for page in lost)
    return wanted


def with_mirrored(*on_the_device: int, absent: tuple[int, ...]) -> Ledger:
    """Pages whose copies are in the mirror; some of them have left the device, and the rest of it is free."""
    ledger = ledger_with(*on_the_device, *absent, 9, 10, 11, 12, virtual=12)
    cached(ledger, *absent)
    held(ledger, "other", 9, 10, 11, 12)  # evicts them
    ledger.drop("other")
    ledger.release([9, 10, 11, 12])
    cached(ledger, *on_the_device)
    assert on_device(ledger) == set(on_the_device)
    return ledger


def test_free_places_take_the_hottest_pages() -> None:
    ledger = with_mirrored(1, 2, absent=(3, 4, 5))
    warm(ledger, 1, 2, 3, 4, 5)
    assert worth_fetching(ledger, 5, 4) == [5, 4]
    assert worth_fetching(ledger, 3) == [3]


def test_free_places_take_pages_that_are_colder_than_those_there() -> None:
    ledger = with_mirrored(1, 2, absent=(3, 4, 5))
    warm(ledger, 5, 4, 3, 1, 2)
    assert worth_fetching(ledger, 3, 4, 5) == [3, 4]


@pytest.mark.parametrize(
    ("heat", "given", "wanted"),
    [
        # Pages 1 to 4 are on the device, pages 5 to 8 are not; `heat` names them from cold to hot.
        pytest.param([1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5], [8, 7, 6, 5], id="all are hotter"),
        pytest.param([5, 6, 7, 8, 1, 2, 3, 4], [8, 7, 6, 5], [], id="all are colder"),
        pytest.param([1, 2, 8, 3, 4], [8], [8], id="one is hotter than the coldest"),
        pytest.param([1, 5, 2, 6, 7, 3, 8, 4], [8, 7, 6, 5], [8, 7], id="the second coldest is hotter than the third"),
        pytest.param([1, 6, 2, 3, 4, 8], [8, 6], [8], id="each displaces one"),
        pytest.param([8, 7], [7, 8], [7, 8], id="cold ones are displaced"),
        pytest.param([], [5, 6], [], id="equally cold ones are not"),
        pytest.param([1, 2, 3, 4, 8, 7], [7, 8], [7, 8], id="fewer than there are"),
        pytest.param([5, 6, 7, 8], [], [], id="nothing given"),
    ],
)
def test_without_a_free_place_only_hotter_pages_are_worth_it(
    heat: list[int], given: list[int], wanted: list[int]
) -> None:
    ledger = with_mirrored(1, 2, 3, 4, absent=(5, 6, 7, 8))
    warm(ledger, *heat)
    assert worth_fetching(ledger, *given) == wanted


def test_as_hot_is_not_hotter() -> None:
    ledger = with_mirrored(1, 2, 3, 4, absent=(5, 6))
    ledger.heat.select(np.arange(1, 7))
    assert worth_fetching(ledger, 5, 6) == []


def test_only_what_can_be_given_up_is_displaced() -> None:
    ledger = with_mirrored(1, 2, 3, 4, absent=(5, 6, 7))
    held(ledger, "a", 1)
    number = ledger.forward_started()
    held(ledger, "b", 2)
    ledger.drop("b")  # the pass may read it
    ledger.copy_started(ledger.v2p[[3]], arriving=False)
    warm(ledger, 5, 6, 7)
    assert worth_fetching(ledger, 7, 6, 5) == [7], "in place of page 4"
    ledger.forward_finished(number)
    assert worth_fetching(ledger, 7, 6, 5) == [7, 6]


def test_only_mirrored_pages_that_are_not_there_are_fetched() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5, 6)
    cached(ledger, 1, 2, 3, 4)
    held(ledger, "a", 5)  # evicts 1; it has no mirror copy
    ledger.drop("a")
    ledger.release([3])
    warm(ledger, 2, 5, 6, 1)
    assert worth_fetching(ledger, 1, 6, 5, 2) == [1]
    assert worth_fetching(ledger, 6, 5, 2) == []


def test_pages_with_a_place_on_the_device() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5)
    cached(ledger, 1, 2, 3, 4)
    held(ledger, "a", 5)  # evicts 1
    assert ledger.on_device([5, 1, 2]).tolist() == [True, False, True]
    ledger.copy_started(ledger.v2p[[2]], arriving=True)
    assert ledger.on_device(np.array([2])).tolist() == [True], "its content may still be on its way"
    assert ledger.on_device([]).tolist() == []


# --- forward passes in flight ----------------------------------------------------------------------------------------


def test_passes_are_numbered() -> None:
    ledger = ledger_with(1)
    assert ledger.passes == 0
    assert [ledger.forward_started(), ledger.passes, ledger.forward_started(), ledger.passes] == [1, 1, 2, 2]
    ledger.forward_finished(1)
    assert ledger.passes == 2
    ledger.forward_finished(2)
    assert ledger.passes == 2


def test_a_page_dropped_during_a_forward_pass_is_not_evicted_before_that_is_done() -> None:
    ledger = full_of_held_pages()
    number = ledger.forward_started()
    ledger.drop("a", [2])
    assert ledger.obtainable_pages == 0
    assert ledger.hold("b", [5]) is None
    ledger.forward_finished(number)
    assert ledger.obtainable_pages == 1
    held(ledger, "b", 5)
    assert on_device(ledger) == {1, 3, 4, 5}


def test_a_page_not_retained_during_a_forward_pass_is_not_evicted_before_that_is_done() -> None:
    ledger = full_of_held_pages()
    number = ledger.forward_started()
    ledger.retain("a", [1, 3, 4])
    assert ledger.obtainable_pages == 0
    assert ledger.hold("b", [5]) is None
    ledger.forward_finished(number)
    assert ledger.obtainable_pages == 1
    held(ledger, "b", 5)
    assert on_device(ledger) == {1, 3, 4, 5}


def test_a_device_page_released_during_a_forward_pass_is_not_reused_before_that_is_done() -> None:
    ledger = full_of_held_pages()
    number = ledger.forward_started()
    place = int(ledger.v2p[2])
    ledger.drop("a", [2])
    ledger.release([2])
    ledger.check()
    assert ledger.hold("b", [5]) is None
    ledger.forward_finished(number)
    assert pairs(held(ledger, "b", 5).fresh) == {5: place}
    ledger.check()


def test_a_released_page_allocated_again_does_not_wait_for_its_old_place() -> None:
    ledger = ledger_with(1)
    held(ledger, "a", 1)
    ledger.forward_started()
    old = int(ledger.v2p[1])
    ledger.drop("a")
    ledger.release([1])
    ledger.allocate([1])
    assert pairs(held(ledger, "b", 1).fresh)[1] != old
    ledger.check()


def test_overlapping_forward_passes_are_waited_for() -> None:
    ledger = full_of_held_pages()
    first, second = ledger.forward_started(), ledger.forward_started()
    ledger.drop("a", [1])
    ledger.drop("a", [2])
    ledger.release([2])
    ledger.forward_finished(first)
    assert ledger.obtainable_pages == 0
    ledger.forward_finished(second)
    assert ledger.obtainable_pages == 2


def test_a_drop_waits_only_for_passes_that_had_started() -> None:
    ledger = full_of_held_pages()
    first = ledger.forward_started()
    ledger.drop("a", [1])
    ledger.forward_started()
    ledger.forward_finished(first)
    assert ledger.obtainable_pages == 1


def test_a_later_pass_that_is_done_stands_for_earlier_ones() -> None:
    ledger = full_of_held_pages()
    first, second = ledger.forward_started(), ledger.forward_started()
    ledger.drop("a", [1])
    ledger.forward_finished(second)
    assert ledger.obtainable_pages == 1
    ledger.forward_finished(first)
    assert ledger.obtainable_pages == 1
    ledger.check()


def test_a_page_shared_with_a_running_request_waits_for_the_last_reader() -> None:
    ledger = full_of_held_pages()
    held(ledger, "b", 1)
    first = ledger.forward_started()
    ledger.drop("a", [1])
    ledger.forward_finished(first)
    second = ledger.forward_started()
    ledger.drop("b")
    assert ledger.obtainable_pages == 0
    ledger.forward_finished(second)
    assert ledger.obtainable_pages == 1


# --- copies in flight ------------------------------------------------------------------------------------------------


def places(ledger: Ledger, *pages: int) -> np.ndarray:
    return ledger.v2p[list(pages)]


@pytest.mark.parametrize("arriving", [True, False])
def test_a_page_that_is_being_copied_is_not_evicted(arriving: bool) -> None:
    ledger = ledger_with(1, 2, 3, 4, 5)
    cached(ledger, 1, 2, 3, 4)
    copied = places(ledger, 1, 2, 3)
    ledger.copy_started(copied, arriving)
    ledger.check()
    assert ledger.obtainable_pages == 1
    held(ledger, "a", 5)
    assert on_device(ledger) == {1, 2, 3, 5}
    ledger.copy_finished(copied, arriving)
    assert ledger.obtainable_pages == 3


def test_a_page_that_is_being_copied_twice_waits_for_both_copies() -> None:
    ledger = ledger_with(1)
    cached(ledger, 1)
    place = places(ledger, 1)
    ledger.copy_started(place, arriving=True)
    ledger.copy_started(place, arriving=False)
    ledger.copy_finished(place, arriving=True)
    assert ledger.obtainable_pages == 3
    ledger.copy_finished(place, arriving=False)
    assert ledger.obtainable_pages == 4


@pytest.mark.parametrize("last", ["copy", "forward"])
@pytest.mark.parametrize("arriving", [True, False])
def test_a_released_place_is_free_when_copies_and_forward_passes_are_done(arriving: bool, last: str) -> None:
    ledger = full_of_held_pages()
    place = places(ledger, 2)
    number = ledger.forward_started()
    ledger.copy_started(place, arriving)
    ledger.drop("a", [2])
    ledger.release([2])
    ledger.check()
    assert ledger.hold("b", [5]) is None
    if last == "copy":
        ledger.forward_finished(number)
        assert ledger.hold("b", [5]) is None
        ledger.copy_finished(place, arriving)
    else:
        ledger.copy_finished(place, arriving)
        assert ledger.hold("b", [5]) is None
        ledger.forward_finished(number)
    ledger.check()
    assert pairs(held(ledger, "b", 5).fresh) == {5: int(place[0])}
    assert ledger.arrived(np.array([5]))


def test_a_place_released_without_a_pass_in_flight_waits_for_its_copy() -> None:
    ledger = full_of_held_pages()
    place = places(ledger, 2)
    ledger.copy_started(place, arriving=False)
    ledger.drop("a", [2])
    ledger.release([2])
    assert ledger.hold("b", [5]) is None
    ledger.copy_finished(place, arriving=False)
    assert ledger.hold("b", [5]) is not None


def test_a_page_has_arrived_when_its_content_is_there() -> None:
    ledger = ledger_with(1, 2, 3)
    cached(ledger, 1, 2)
    pages = np.array([2, 1])
    assert ledger.arrived(pages)
    ledger.copy_started(places(ledger, 2), arriving=True)
    ledger.copy_started(places(ledger, 1), arriving=False)
    assert ledger.arriving(pages).tolist() == [True, False]
    assert not ledger.arrived(pages)
    assert ledger.arrived(pages[1:])
    ledger.copy_finished(places(ledger, 2), arriving=True)
    assert ledger.arrived(pages)
    assert not ledger.arrived(np.array([1, 3])), "page 3 has no place"
    assert not ledger.arriving(np.array([3])).any()
    assert ledger.arrived(pages[:0])


def test_content_on_its_way_moves_along_when_pages_are_substituted() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5)
    cached(ledger, 1, 5)  # both are in the mirror
    held(ledger, "b", 2, 3, 4)  # evicts 1
    place = places(ledger, 5)
    held(ledger, "a", 5)
    ledger.copy_started(place, arriving=True)
    ledger.substitute("a", [5], [1])
    ledger.check()
    assert places(ledger, 1) == place
    assert not ledger.arrived(np.array([1]))
    ledger.copy_finished(place, arriving=True)
    assert ledger.arrived(np.array([1]))


def test_a_copy_that_never_began_cannot_end() -> None:
    ledger = ledger_with(1)
    cached(ledger, 1)
    place = places(ledger, 1)
    with pytest.raises(LedgerError, match=rf"a copy of \[{place[0]}\] ended that never began"):
        ledger.copy_finished(place, arriving=False)
    ledger.copy_started(place, arriving=False)
    ledger.copy_finished(place, arriving=False)
    with pytest.raises(LedgerError, match="ended that never began"):
        ledger.copy_finished(place, arriving=False)


def test_a_page_handed_out_again_is_another_page() -> None:
    ledger = ledger_with(1, 2)
    before = ledger.generation(np.array([1, 2])).copy()
    cached(ledger, 1)
    assert ledger.generation(np.array([1, 2])).tolist() == before.tolist()
    ledger.release([1])
    ledger.allocate([1])
    assert (ledger.generation(np.array([1, 2])) == before).tolist() == [False, True]


def test_moved_pages_are_told_once() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5, 6)
    assert ledger.take_moved().tolist() == list(range(9)), "whoever keeps a copy of the map has none yet"
    assert ledger.take_moved().tolist() == []
    held(ledger, "a", 2, 4)
    assert ledger.take_moved().tolist() == [2, 4]
    assert ledger.take_moved().tolist() == []
    held(ledger, "a", 4)
    ledger.drop("a")
    assert ledger.take_moved().tolist() == []
    cached(ledger, 1, 3)
    ledger.take_moved()
    ledger.mirrored([2])
    held(ledger, "b", 5)  # evicts the least recently used page, which is 2
    assert ledger.take_moved().tolist() == [2, 5]
    ledger.release([3])
    held(ledger, "b", 6)
    assert ledger.take_moved().tolist() == [3, 6]
    held(ledger, "a", 4)
    ledger.substitute("a", [4], [1])
    ledger.drop("a")
    ledger.drop("b")
    ledger.take_moved()
    ledger.reset()
    assert ledger.take_moved().tolist() == list(range(9))


def test_any_moved_until_it_was_told() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5)
    assert ledger.any_moved
    ledger.take_moved()
    assert not ledger.any_moved
    for move in (
        lambda: held(ledger, "a", 1, 2),
        lambda: cached(ledger, 3, 4),
        lambda: held(ledger, "a", 5),  # evicts 3
        lambda: ledger.release([4]),
        lambda: ledger.substitute("a", [5], [3]),
    ):
        move()
        assert ledger.any_moved
        assert len(ledger.take_moved())
        assert not ledger.any_moved
    ledger.drop("a")
    assert not ledger.any_moved
    ledger.reset()
    assert ledger.any_moved


@pytest.mark.parametrize(
    "still",
    [
        lambda ledger: held(ledger, "b", 1),
        lambda ledger: ledger.release([3]),
        lambda ledger: ledger.retain("a", [1]),
        lambda ledger: ledger.mirrored([1]),
        lambda ledger: ledger.hold("b", [3, 4, 5, 6, 7]),
    ],
    ids=["hold", "release", "retain", "mirror", "no room"],
)
def test_any_moved_is_false_when_nothing_moved(still: Any) -> None:
    ledger = ledger_with(1, 2, 3, 4, 5, 6, 7)
    held(ledger, "a", 1, 2)
    ledger.take_moved()
    still(ledger)
    assert not ledger.any_moved
    assert ledger.take_moved().tolist() == []


# --- what can be had once everything in flight is done ---------------------------------------------------------------


def obtainable(ledger: Ledger) -> tuple[int, int]:
    ledger.check()
    return ledger.obtainable_pages, ledger.obtainable_later


def test_nothing_in_flight() -> None:
    ledger = ledger_with(1, 2, 3)
    assert obtainable(ledger) == (4, 4)
    held(ledger, "a", 1, 2)
    assert obtainable(ledger) == (2, 2)
    cached(ledger, 3)
    assert obtainable(ledger) == (2, 2)
    ledger.drop("a")
    assert obtainable(ledger) == (2, 2), "pages without a mirror copy stay"
    ledger.mirrored([1])
    assert obtainable(ledger) == (3, 3)


def test_pages_that_a_pass_may_read_can_be_had_later() -> None:
    ledger = full_of_held_pages()
    number = ledger.forward_started()
    ledger.drop("a", [1, 2])
    assert obtainable(ledger) == (0, 2)
    ledger.forward_finished(number)
    assert obtainable(ledger) == (2, 2)


def test_released_places_that_a_pass_may_read_can_be_had_later() -> None:
    ledger = full_of_held_pages()
    number = ledger.forward_started()
    ledger.drop("a", [1, 2])
    ledger.release([2])
    assert obtainable(ledger) == (0, 2)
    ledger.forward_finished(number)
    assert obtainable(ledger) == (2, 2)


def test_pages_on_their_way_to_the_mirror_can_be_had_later() -> None:
    ledger = ledger_with(1, 2, 3)
    held(ledger, "a", 1, 2, 3)
    ledger.copy_started(places(ledger, 1, 2), arriving=False)
    assert obtainable(ledger) == (1, 1), "they are held"
    ledger.drop("a")
    assert obtainable(ledger) == (1, 3)
    ledger.copy_finished(places(ledger, 1, 2), arriving=False)
    ledger.mirrored([1, 2])
    assert obtainable(ledger) == (3, 3)


def test_pages_on_their_way_to_the_device_can_be_had_later() -> None:
    ledger = ledger_with(1)
    cached(ledger, 1)
    ledger.copy_started(places(ledger, 1), arriving=True)
    assert obtainable(ledger) == (3, 4)
    ledger.copy_finished(places(ledger, 1), arriving=True)
    assert obtainable(ledger) == (4, 4)


# --- substitution ----------------------------------------------------------------------------------------------------


def test_substitute_moves_the_device_copy_when_the_new_page_has_none() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5)
    cached(ledger, 1)  # the tree's page
    held(ledger, "a", 2, 3, 4, 5)  # evicts it
    place = int(ledger.v2p[3])
    ledger.substitute("a", [3], [1])
    ledger.check()
    assert ledger.v2p[1] == place
    assert ledger.v2p[3] == 0
    assert ledger.held_by("a") == {1, 2, 4, 5}
    assert ledger.recalls == 0
    ledger.release([3])
    ledger.check()
    assert int(ledger.v2p[1]) == place


def test_substitute_uses_the_device_copy_that_the_new_page_has() -> None:
    ledger = ledger_with(1, 2)
    cached(ledger, 1)
    place = int(ledger.v2p[1])
    held(ledger, "a", 2)
    ledger.substitute("a", [2], [1])
    ledger.check()
    assert int(ledger.v2p[1]) == place
    assert ledger.held_by("a") == {1}
    ledger.release([2])
    assert ledger.obtainable_pages == 3
    ledger.check()


def test_substitute_leaves_equal_and_foreign_pages_alone() -> None:
    ledger = ledger_with(1, 2, 3)
    held(ledger, "a", 1, 2)
    held(ledger, "b", 3)
    ledger.substitute("a", [1, 2], [1, 3])
    ledger.check()
    assert ledger.held_by("a") == {1, 3}
    assert ledger.held_by("b") == {3}
    assert on_device(ledger) == {1, 2, 3}


def test_substitute_for_a_holder_without_holds_moves_an_unheld_copy() -> None:
    """A request whose window is chosen already holds only part of its prompt; all of it is replaced."""
    ledger = ledger_with(1, 2, 3, 4, 5)
    cached(ledger, 1, 2)
    held(ledger, "b", 3, 4, 5)  # evicts 1
    assert on_device(ledger) == {2, 3, 4, 5}
    place = int(ledger.v2p[2])
    ledger.substitute("a", [2], [1])
    ledger.check()
    assert int(ledger.v2p[1]) == place
    assert ledger.holders() == ["b"]
    assert ledger.obtainable_pages == 1  # page 1 has a mirror copy, so it can be given up


def test_substitute_keeps_a_moved_copy_until_passes_in_flight_are_done() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5, 6)
    cached(ledger, 1)
    held(ledger, "a", 2, 3, 4, 5)
    number = ledger.forward_started()
    ledger.drop("a", [3])
    ledger.substitute("a", [3], [1])
    assert ledger.hold("b", [6]) is None
    ledger.forward_finished(number)
    assert ledger.hold("b", [6]) is not None


def test_substitute_never_takes_a_copy_from_another_holder() -> None:
    ledger = ledger_with(1, 2)
    held(ledger, "b", 1)
    place = int(ledger.v2p[1])
    ledger.substitute("a", [1], [2])
    assert int(ledger.v2p[1]) == place
    assert ledger.held_by("b") == {1}
    assert ledger.v2p[2] == 0


def test_substitute_never_leaves_a_page_held_whose_content_was_not_brought_in() -> None:
    """The copy of the old page cannot move, since another request reads it, and nobody sees the plan of a recall."""
    ledger = ledger_with(1, 2, 3, 4, 5)
    cached(ledger, 1)
    held(ledger, "b", 2, 3, 4, 5)
    assert on_device(ledger) == {2, 3, 4, 5}
    ledger.drop("b", [5])
    ledger.mirrored([5])
    held(ledger, "a", 2)
    with pytest.raises(LedgerError):
        ledger.substitute("a", [2], [1])


# --- reset and check -------------------------------------------------------------------------------------------------


def test_reset_forgets_everything_but_the_counters() -> None:
    ledger = ledger_with(1, 2, 3, 4, 5)
    cached(ledger, 1, 2, 3, 4, 5)
    ledger.reset()
    ledger.check()
    assert (ledger.allocated_pages, ledger.device_pages, ledger.host_pages) == (0, 0, 0)
    assert ledger.obtainable_pages == 4
    assert ledger.evictions == 1
    ledger.allocate([1])


def test_reset_keeps_the_array_that_attention_reads() -> None:
    ledger = ledger_with(1)
    table = ledger.v2p
    cached(ledger, 1)
    ledger.reset()
    assert ledger.v2p is table
    assert not table.any()


def test_reset_while_pages_are_held_is_an_error() -> None:
    ledger = ledger_with(1)
    held(ledger, "a", 1)
    before = state(ledger)
    with pytest.raises(LedgerError, match=r"reset while \['a'\] hold pages"):
        ledger.reset()
    assert state(ledger) == before


def test_reset_during_a_forward_pass_is_an_error() -> None:
    """The pass still reads the pages that would be handed out again."""
    ledger = ledger_with(1)
    held(ledger, "a", 1)
    number = ledger.forward_started()
    ledger.drop("a")
    with pytest.raises(LedgerError):
        ledger.reset()
    ledger.forward_finished(number)
    ledger.reset()


def test_reset_while_pages_are_copied_is_an_error() -> None:
    ledger = ledger_with(1, 2)
    cached(ledger, 1, 2)
    copied = places(ledger, 1, 2)
    ledger.copy_started(copied, arriving=True)
    before = state(ledger)
    with pytest.raises(LedgerError, match="reset while 2 pages are being copied"):
        ledger.reset()
    assert state(ledger) == before
    ledger.copy_finished(copied, arriving=True)
    ledger.reset()
    ledger.check()


def padding_mapped(ledger: Ledger) -> None:
    ledger.v2p[0] = 1


def shared_place(ledger: Ledger) -> None:
    ledger.v2p[2] = ledger.v2p[1]


def disagreement(ledger: Ledger) -> None:
    ledger.p2v[ledger.v2p[1]] = 2


def stale_place(ledger: Ledger) -> None:
    ledger.p2v[4] = 3


def mapped_but_not_allocated(ledger: Ledger) -> None:
    ledger._allocated[1] = False
    ledger._mirrored[1] = False


def mirrored_but_not_allocated(ledger: Ledger) -> None:
    ledger._mirrored[7] = True


def free_place_copied(ledger: Ledger) -> None:
    ledger.copy_started(np.array(ledger._free[:1]), arriving=False)


def wrong_count(ledger: Ledger) -> None:
    ledger._pins[1] += 1


def held_but_absent(ledger: Ledger) -> None:
    ledger._free += ledger._detach(np.array([2])).tolist()
    ledger._mirrored[2] = True


def nowhere(ledger: Ledger) -> None:
    ledger._free += ledger._detach(np.array([1])).tolist()
    ledger._mirrored[1] = False


def lost_place(ledger: Ledger) -> None:
    ledger._free.pop()


def doubled_place(ledger: Ledger) -> None:
    ledger._free.append(ledger._free[0])


def empty_holder(ledger: Ledger) -> None:
    ledger._holders["b"] = set()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (padding_mapped, "the padding page is mapped"),
        (shared_place, "two virtual pages share a physical page"),
        (disagreement, "v2p and p2v disagree"),
        (stale_place, "a physical page maps to a page that is not on the device"),
        (mapped_but_not_allocated, "a page on the device is not allocated"),
        (mirrored_but_not_allocated, "a page that is not allocated has a mirror copy"),
        (free_place_copied, "a free physical page is being copied"),
        (wrong_count, "the hold counts are wrong"),
        (held_but_absent, "a held page is not on the device"),
        (nowhere, "a page is nowhere"),
        (lost_place, "a physical page was lost or counted twice"),
        (doubled_place, "a physical page was lost or counted twice"),
        (empty_holder, "a holder without pages is remembered"),
    ],
)
def test_check_notices(damage: Any, words: str) -> None:
    ledger = ledger_with(1, 2)
    cached(ledger, 1)
    held(ledger, "a", 2)
    ledger.check()
    damage(ledger)
    with pytest.raises(LedgerError, match=words):
        ledger.check()


# --- random operations against a model -------------------------------------------------------------------------------

VIRTUAL, PHYSICAL = 10, 5
HOLDERS = st.sampled_from("abc")
ANY = st.sets(st.integers(1, VIRTUAL), min_size=1)
FEW = st.sets(st.integers(1, VIRTUAL), min_size=1, max_size=3)
TOKENS = st.lists(st.integers(0, VIRTUAL), min_size=PHYSICAL, max_size=PHYSICAL)


class LedgerMachine(RuleBasedStateMachine):
    """Requests, forward passes and copies at random, on simulated memory.

    The model keeps the words of the documentation: who holds what, which page was used when, which passes are in
    flight and what they read. Content is a number; a new device page holds garbage (None) until it is written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(VIRTUAL, PHYSICAL)
        self.content: dict[int, int | None] = {}  # allocated page -> what it must hold (None: not written yet)
        self.device: dict[int, int] = {}  # page -> physical page
        self.mirrored: set[int] = set()
        self.holders: dict[str, set[int]] = {}
        self.used: dict[int, int] = {}
        self.busy: dict[int, int] = {}  # page -> number of the last pass that may read it
        self.given_up: dict[int, int] = {}  # physical page -> number of the last pass that may read it
        self.reads: dict[int, dict[int, int]] = {}  # pass in flight -> physical page -> content it must find
        self.started = self.finished = self.clock = self.written = 0
        self.device_bytes: dict[int, int | None] = {}
        self.host_bytes: dict[int, int] = {}
        self.recalls: list[dict[int, int]] = []  # copies in flight: physical page -> content on its way
        self.stores: list[list[tuple[int, int, int, int]]] = []  # page, its generation, physical page, content
        self.generations: dict[int, int] = {}
        self.map = np.zeros(VIRTUAL + 1, dtype=np.int64)  # a copy of the page map, as a GPU has one
        self.heat: dict[int, float] = {}
        self.selection = 1.0  # what one selection adds to a page's heat now

    # -- the model's own answers

    def held(self) -> set[int]:
        return set().union(*self.holders.values()) if self.holders else set()

    def evictable(self) -> set[int]:
        return {
            page
            for page in self.device
            if page in self.mirrored
            and page not in self.held()
            and self.busy.get(page, 0) <= self.finished
            and self.device[page] not in self.copied()
        }

    def arriving(self) -> set[int]:
        """Physical pages whose content is on its way."""
        return {place for recall in self.recalls for place in recall}

    def copied(self) -> set[int]:
        """Physical pages that a copy in flight reads or writes."""
        return self.arriving() | {place for store in self.stores for _, _, place, _ in store}

    def readable(self) -> set[int]:
        """Pages with content on the device."""
        arriving = self.arriving()
        return {page for page, place in self.device.items() if self.content[page] is not None and place not in arriving}

    def obtainable_later(self) -> int:
        """Device pages that are free, or can be given up once all passes and copies are done."""
        stored = {
            page for store in self.stores for page, generation, _, _ in store if self.generations[page] == generation
        }
        return PHYSICAL - len(set(self.device) - ((self.mirrored | stored) - self.held()))

    def take_back(self) -> None:
        """Physical pages that nothing in flight touches are free."""
        copied = self.copied()
        self.given_up = {
            place: reader for place, reader in self.given_up.items() if reader > self.finished or place in copied
        }

    def free(self) -> int:
        return PHYSICAL - len(self.device) - len(self.given_up)

    def model_drop(self, holder: str, pages: set[int]) -> None:
        for page in pages & self.holders.get(holder, set()):
            self.holders[holder].discard(page)
            self.busy[page] = self.started
        if not self.holders.get(holder, {0}):
            del self.holders[holder]

    # -- the allocator

    def allocate(self, pages: set[int]) -> None:
        new = sorted(pages - set(self.content))
        self.ledger.allocate(new)
        self.content |= dict.fromkeys(new)
        for page in new:
            self.generations[page] = self.generations.get(page, 0) + 1
            self.heat.pop(page, None)

    @rule(pages=FEW)
    def release(self, pages: set[int]) -> None:
        gone = sorted((pages & set(self.content)) - self.held())
        self.ledger.release(gone)
        for page in gone:
            del self.content[page]
            self.mirrored.discard(page)
            self.used.pop(page, None)
            self.busy.pop(page, None)
            if page in self.device and (self.started > self.finished or self.device[page] in self.copied()):
                self.given_up[self.device.pop(page)] = self.started
            self.device.pop(page, None)

    # -- requests

    @rule(holder=HOLDERS, pages=FEW, late=st.booleans())
    def hold(self, holder: str, pages: set[int], late: bool = False) -> None:
        """``late``: what must be recalled arrives later."""
        self.allocate(pages)
        absent = pages - set(self.device)
        short = len(absent) - self.free()
        possible = self.evictable() - pages
        before = state(self.ledger)
        plan = self.ledger.hold(holder, sorted(pages))
        if plan is None:
            assert short > len(possible), "refused although there was room"
            assert state(self.ledger) == before
            return
        assert short <= len(possible), "granted although there was no room"
        evicted = set(self.device) - on_device(self.ledger)
        assert len(evicted) == max(0, short)
        assert evicted <= possible
        if evicted and possible - evicted:
            spared = possible - evicted
            assert max(self.worth(page) for page in evicted) <= min(self.worth(page) for page in spared)
        for page in evicted:
            del self.device[page]
        recall, fresh = pairs(plan.recall), pairs(plan.fresh)
        assert set(recall) == absent & self.mirrored
        assert set(fresh) == absent - self.mirrored
        for page, place in (recall | fresh).items():
            assert place not in self.device.values(), "two virtual pages share a physical page"
            assert place not in self.given_up, "reused while a forward pass reads it"
            assert place not in self.copied(), "reused while it is being copied"
            assert 1 <= place <= PHYSICAL
            self.device[page] = place
            self.device_bytes[place] = self.host_bytes[page] if page in recall and not late else None
        if recall and late:
            self.recalls.append({place: self.host_bytes[page] for page, place in recall.items()})
            self.ledger.copy_started(plan.recall[1], arriving=True)
        self.holders.setdefault(holder, set()).update(pages)
        self.clock += 1
        self.used |= dict.fromkeys(pages, self.clock)

    def worth(self, page: int) -> tuple[float, int]:
        """Pages with less of it are given up first."""
        return self.heat.get(page, 0.0), self.used[page]

    @rule(pages=FEW)
    def select(self, pages: set[int]) -> None:
        """A resident set has those of ``pages`` that exist."""
        selected = sorted(pages & set(self.content))
        self.ledger.heat.select(np.array(selected, dtype=np.int64))
        for page in selected:
            self.heat[page] = self.heat.get(page, 0.0) + self.selection
        self.selection *= 2 ** (1 / HALF_LIFE)

    @rule(pages=ANY)
    def fetch(self, pages: set[int]) -> None:
        """Somebody brings in, ahead of time, what is worth it; nobody holds it."""
        hottest = sorted(pages, key=lambda page: -self.heat.get(page, 0.0))
        worth = self.ledger.worth_fetching(np.array(hottest, dtype=np.int64)).tolist()
        possible = [page for page in hottest if page in self.mirrored and page not in self.device]
        assert worth == possible[: len(worth)]
        free, coldest = self.free(), sorted(self.heat.get(page, 0.0) for page in self.evictable())
        gains = [self.heat.get(page, 0.0) > cold for page, cold in zip(possible[free:], coldest, strict=False)]
        assert len(worth) == min(len(possible), free) + (gains.index(False) if False in gains else len(gains))
        if worth:
            self.hold("a", set(worth))
            self.drop("a", set(worth))

    @rule(holder=HOLDERS, pages=st.none() | ANY)
    def drop(self, holder: str, pages: set[int] | None = None) -> None:
        self.ledger.drop(holder, pages)
        self.model_drop(holder, set(self.content) if pages is None else pages)

    @rule(holder=HOLDERS, pages=ANY)
    def retain(self, holder: str, pages: set[int]) -> None:
        self.ledger.retain(holder, pages)
        self.model_drop(holder, self.holders.get(holder, set()) - pages)

    @precondition(lambda self: self.copies())
    @rule(choice=st.integers(0, 99), more=st.booleans())
    def substitute(self, choice: int, more: bool) -> None:
        """A page of one request turns out to be in the tree already; its copy is released afterwards."""
        known = self.copies()
        holder, old, new = known[choice % len(known)]
        old_pages, new_pages = [old], [new]
        if more:  # as in use: equal ids in front, of pages that the tree has under the same number
            same = sorted(set(self.content) - {old, new})
            old_pages, new_pages = [*same, old], [*same, new]
        self.ledger.substitute(holder, old_pages, new_pages)
        self.heat[new] = max(self.heat.get(new, 0.0), self.heat.pop(old, 0.0))
        if new not in self.device and old not in self.held_by_others(holder):
            self.device[new] = self.device.pop(old)
            self.used[new] = self.used.pop(old)
            self.busy[new] = self.started
            if old not in self.mirrored:
                self.content[old] = None
        if old in self.holders.get(holder, set()):
            self.model_drop(holder, {old})
            self.holders.setdefault(holder, set()).add(new)
            self.clock += 1
            self.used[new] = self.clock
        if old not in self.held():
            self.release({old})

    def copies(self) -> list[tuple[str, int, int]]:
        """``(holder, old, new)``: two pages with the same tokens.

        A holder that shares the old page with others is left out where the new page would have to be recalled.
        """
        return [
            (holder, old, new)
            for holder in "abc"
            for old in sorted(self.device)
            for new, content in sorted(self.content.items())
            if new != old
            and content is not None
            and content == self.content[old]
            and (
                new in self.device
                or old not in self.held_by_others(holder)
                or old not in self.holders.get(holder, set())
            )
        ]

    def held_by_others(self, holder: str) -> set[int]:
        return {page for name, pages in self.holders.items() if name != holder for page in pages}

    # -- forward passes and copies

    @rule(tokens=TOKENS)
    def start_forward(self, tokens: list[int]) -> None:
        """A pass writes the held pages that have no content yet and reads all held pages.

        A small number in ``tokens`` stands for the tokens that some other page has, too.
        """
        number = self.ledger.forward_started()
        self.started += 1
        assert number == self.started
        empty = [page for page in sorted(self.held()) if self.content[page] is None]
        for choice, page in zip(tokens, empty, strict=False):
            known = [content for content in self.content.values() if content is not None]
            self.written += 1
            self.content[page] = known[choice] if choice < len(known) else self.written
            self.device_bytes[self.device[page]] = self.content[page]
        readable = self.held() & self.readable()
        self.reads[number] = {
            self.device[page]: content for page in readable if (content := self.content[page]) is not None
        }

    @rule(choice=st.integers(0, 99), pages=ANY)
    def finish_forward(self, choice: int, pages: set[int]) -> None:
        """One of the passes in flight reports, those before it are done as well; some pages are mirrored then."""
        if self.reads:
            number = sorted(self.reads)[choice % len(self.reads)]
            self.ledger.forward_finished(number)
            self.finished = number
            self.reads = {other: reads for other, reads in self.reads.items() if other > number}
            self.take_back()
        done = sorted(pages & self.readable())
        self.ledger.mirrored(done)
        self.mirrored.update(done)
        for page in done:
            content = self.device_bytes[self.device[page]]
            assert content is not None
            self.host_bytes[page] = content

    @rule(pages=ANY)
    def start_store(self, pages: set[int]) -> None:
        """Some pages with content are copied to the mirror, while everything else goes on."""
        done = sorted(pages & self.readable())
        if not done:
            return
        self.ledger.copy_started(self.ledger.v2p[done], arriving=False)
        self.stores.append([])
        for page in done:
            content = self.device_bytes[self.device[page]]
            assert content is not None
            self.stores[-1].append((page, self.generations[page], self.device[page], content))

    @precondition(lambda self: self.stores)
    @rule()
    def finish_store(self) -> None:
        """The oldest store is done; it counts for pages that are still the same, in the same place."""
        store = self.stores.pop(0)
        pages, generations, at = (np.array(column) for column in list(zip(*store, strict=True))[:3])
        self.ledger.copy_finished(at, arriving=False)
        same = (self.ledger.generation(pages) == generations) & (self.ledger.v2p[pages] == at)
        self.ledger.mirrored(pages[same])
        for (page, generation, place, content), still in zip(store, same.tolist(), strict=True):
            assert still == (self.generations[page] == generation and self.device.get(page) == place)
            if still:
                self.mirrored.add(page)
                self.host_bytes[page] = content
        self.take_back()

    @precondition(lambda self: self.recalls)
    @rule()
    def finish_recall(self) -> None:
        recall = self.recalls.pop(0)
        self.device_bytes |= recall
        self.ledger.copy_finished(np.array(list(recall)), arriving=True)
        self.take_back()

    @rule()
    def finish_everything(self) -> None:
        """What was promised for later can be had now. Without it, nothing says what "later" means."""
        later = self.ledger.obtainable_later
        self.ledger.forward_finished(self.started)
        self.finished = self.started
        self.reads.clear()
        self.take_back()
        while self.stores:
            self.finish_store()
        while self.recalls:
            self.finish_recall()
        assert self.ledger.obtainable_pages == self.ledger.obtainable_later == later

    @rule()
    def bring_the_map_up_to_date(self) -> None:
        moved = self.ledger.take_moved()
        self.map[moved] = self.ledger.v2p[moved]
        assert (self.map == self.ledger.v2p).all()

    @rule(holder=HOLDERS, pages=FEW, tokens=TOKENS)
    def serve(self, holder: str, pages: set[int], tokens: list[int]) -> None:
        """A short request from beginning to end; its pages stay cached."""
        self.hold(holder, pages)
        self.start_forward(tokens)
        self.finish_forward(-1, pages)
        self.drop(holder)

    @precondition(lambda self: self.started == self.finished and self.clock % 16 == 15)
    @rule()
    def flush(self) -> None:
        for holder in list(self.holders):
            with pytest.raises(LedgerError, match="hold pages"):
                self.ledger.reset()
            self.drop(holder)
        if self.copied():
            with pytest.raises(LedgerError, match="being copied"):
                self.ledger.reset()
            while self.stores:
                self.finish_store()
            while self.recalls:
                self.finish_recall()
        self.ledger.reset()
        for record in (self.content, self.device, self.mirrored, self.used, self.busy, self.given_up, self.generations):
            record.clear()
        self.heat.clear()
        self.selection = 1.0

    # -- what holds after every step

    @invariant()
    def ledger_agrees_with_model(self) -> None:
        ledger = self.ledger
        ledger.check()
        assert pairs((np.flatnonzero(ledger.v2p), ledger.v2p[ledger.v2p > 0])) == self.device
        assert {page for page in range(1, VIRTUAL + 1) if ledger.is_mirrored([page])[0]} == self.mirrored
        assert {holder: set(ledger.held_by(holder)) for holder in ledger.holders()} == self.holders
        assert ledger.held_pages == len(self.held())
        assert ledger.device_pages == len(self.device) == len(set(self.device.values()))
        assert ledger.host_pages == len(self.mirrored)
        assert ledger.allocated_pages == len(self.content)
        assert ledger.obtainable_pages == self.free() + len(self.evictable())
        assert ledger.obtainable_later == self.obtainable_later()
        assert ledger.passes == self.started
        assert {
            page: heat for page, heat in enumerate(ledger.heat.values.tolist()) if heat and page in self.content
        } == {page: heat for page, heat in self.heat.items() if heat and page in self.content}
        arriving = self.arriving()
        for page in range(1, VIRTUAL + 1):
            assert ledger.arriving(np.array([page]))[0] == (self.device.get(page) in arriving)
            assert ledger.arrived(np.array([page])) == (page in self.device and self.device[page] not in arriving)

    @invariant()
    def nothing_is_lost(self) -> None:
        for page, content in self.content.items():
            if content is None:
                continue
            assert page in self.device or page in self.mirrored
            if page in self.device and self.device[page] not in self.arriving():
                assert self.device_bytes[self.device[page]] == content
            if page in self.mirrored:
                assert self.host_bytes[page] == content

    @invariant()
    def passes_in_flight_read_what_they_should(self) -> None:
        for reads in self.reads.values():
            assert all(self.device_bytes[place] == content for place, content in reads.items())


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=400,
    stateful_step_count=60,
    suppress_health_check=list(HealthCheck),
)
