"""The ledger while passes and copies are in flight, and what can be had once they are done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ledgers import cached, full_of_held_pages, held, ledger_with, on_device, pairs, places

from sglang_lsa.memory.ledger import Ledger, LedgerError

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
