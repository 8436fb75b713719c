"""Promises of device pages: what is owed to each holder, and that it can be had as long as others keep to the rest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_lsa.memory.reservations import Reservations


def test_what_is_taken_is_no_longer_owed() -> None:
    reservations = Reservations()
    reservations.promise("a", 12)
    reservations.promise("b", 3)
    reservations.spend("a", 5)
    assert (reservations.owed("a"), reservations.owed("b"), reservations.total) == (7, 3, 10)
    reservations.settle("b")
    assert (reservations.owed("b"), reservations.total, reservations.holders()) == (0, 7, ["a"])


def test_what_comes_back_is_owed_again() -> None:
    """A streamed prompt takes pages for every chunk, and lets them go."""
    reservations = Reservations()
    reservations.promise("a", 6)
    for _ in range(3):
        reservations.spend("a", 4)
        assert reservations.owed("a") == 2
        reservations.spend("a", -4)
        assert reservations.owed("a") == 6


def test_more_than_was_promised_comes_back_first_to_everybody() -> None:
    reservations = Reservations()
    reservations.promise("a", 2)
    reservations.spend("a", 5)
    assert (reservations.owed("a"), reservations.total) == (0, 0)
    reservations.spend("a", -3)
    assert reservations.owed("a") == 0
    reservations.spend("a", -1)
    assert (reservations.owed("a"), reservations.total) == (1, 1)


def test_no_more_is_owed_than_was_promised() -> None:
    reservations = Reservations()
    reservations.promise("a", 2)
    reservations.spend("a", -9)
    assert reservations.owed("a") == 2


def test_a_promise_that_is_made_again_replaces_the_first() -> None:
    reservations = Reservations()
    reservations.promise("a", 9)
    reservations.spend("a", 4)
    reservations.promise("a", 3)
    assert (reservations.owed("a"), reservations.total) == (3, 3)


def test_who_has_no_promise_is_owed_nothing() -> None:
    reservations = Reservations()
    reservations.spend("stranger", 4)
    reservations.settle("stranger")
    assert (reservations.owed("stranger"), reservations.total, reservations.holders()) == (0, 0, [])


def test_a_promise_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a promise of -1 pages to a: use 0 or more"):
        Reservations().promise("a", -1)


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["promise", "spend", "settle"]), st.integers(-6, 9))))
def test_the_total_is_the_sum_and_what_is_owed_can_be_had(steps: list[tuple[str, str, int]]) -> None:
    """Against a pool of which nobody takes more than what is owed to him and what is owed to nobody."""
    reservations, pool, taken = Reservations(), 20, dict.fromkeys("abc", 0)
    for holder, what, pages in steps:
        room = pool - reservations.total
        if what == "promise" and 0 <= pages <= room + reservations.owed(holder):
            reservations.promise(holder, pages)
        elif what == "settle":
            reservations.settle(holder)
        elif what == "spend" and -taken[holder] <= pages <= room + reservations.owed(holder):
            reservations.spend(holder, pages)
            pool -= pages
            taken[holder] += pages
        assert reservations.total == sum(map(reservations.owed, "abc"))
        assert reservations.total <= pool
