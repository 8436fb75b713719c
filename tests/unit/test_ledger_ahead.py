"""The ledger: what is worth bringing in ahead of time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from ledgers import cached, held, ledger_with, on_device, warm

from sglang_lsa.memory.ledger import Ledger

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
