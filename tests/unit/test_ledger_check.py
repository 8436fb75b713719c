"""The ledger: pages that stand in for others, a reset, and what its check finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ledgers import cached, held, ledger_with, on_device, places, state

from sglang_lsa.memory.ledger import Ledger, LedgerError

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
    ledger._holders._held["b"] = np.zeros(0, dtype=np.int64)


def stale_standby(ledger: Ledger) -> None:
    assert ledger.obtainable_pages
    ledger._last_reader[1] = 1
    ledger._reading.append((1, np.array([1])))


def forgotten_reader(ledger: Ledger) -> None:
    ledger._last_reader[1] = 1


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
        (stale_standby, "what can be given up is wrong"),
        (forgotten_reader, "it is forgotten that passes in flight may read a page"),
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
