"""What is remembered of the pages that can be given up is what looking through all of the pool again would find."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_lsa.memory import standby
from sglang_lsa.memory.heat import Heat, lowest
from sglang_lsa.memory.holders import Holders
from sglang_lsa.memory.ledger import Ledger, LedgerError
from sglang_lsa.memory.standby import Standby


@pytest.mark.parametrize("first", [1, 4, 512])
@pytest.mark.parametrize("seed", range(20))
def test_first_are_the_lowest_of_all(first: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same order, with ties in heat and use, whatever was taken since, and whatever is spared."""
    monkeypatch.setattr(standby, "FIRST", first)
    chance = np.random.default_rng(seed)
    virtual, physical = 120, 60
    places, heat, use = np.zeros(virtual + 1, dtype=np.int64), Heat(virtual + 1), chance.integers(0, 4, virtual + 1)
    lying = chance.permutation(np.arange(1, virtual + 1))[:physical]
    places[lying] = chance.permutation(np.arange(1, physical + 1))
    heat.values[:] = chance.integers(0, 4, virtual + 1)
    there = np.zeros(physical + 1, dtype=np.int64)
    there[places[lying]] = lying
    looked = Standby(places, there, heat, use)
    left = np.sort(lying[: chance.integers(1, physical + 1)])
    looked.found(np.isin(there, left))
    for _ in range(12):
        spared = chance.permutation(np.arange(1, virtual + 1))[: chance.integers(0, 40)]
        count = int(chance.integers(0, 20))
        expected = lowest(left[~np.isin(left, spared)], heat.values, use, count)[:count]
        assert looked.first(count, spared).tolist() == expected.tolist()
        assert looked.count == len(left)
        gone = chance.permutation(lying)[: chance.integers(0, 6)]
        looked.take(places[gone])
        if chance.random() < 0.5:  # given up, and what was recalled lies there
            places[gone] = 0
        left = left[~np.isin(left, gone)]


def fresh(ledger: Ledger, count: int, keep: np.ndarray) -> np.ndarray:
    """As it was done before anything was remembered."""
    found = ledger._evictable()
    return lowest(found[~np.isin(found, keep)], ledger.heat.values, ledger._last_use, count)[: max(0, count)]


@pytest.mark.parametrize("seed", range(30))
def test_a_ledger_gives_up_what_it_would_find_anew(seed: int) -> None:
    """Whatever happened between two holds: passes, copies, selections, pages that come and go."""
    chance = np.random.default_rng(seed)
    ledger = Ledger(100, 40)
    ledger.allocate(range(1, 81))
    names = "abcd"
    stores: list[np.ndarray] = []
    compared = 0
    for _ in range(300):
        pages = np.unique(chance.integers(1, 81, chance.integers(1, 9)))
        holder = names[chance.integers(4)]
        what = chance.integers(10)
        if what < 4:
            wanted, expected = int((ledger.v2p[pages] == 0).sum()) - len(ledger._free), None
            if wanted > 0:
                expected = fresh(ledger, wanted, pages)
            before = np.flatnonzero(ledger.v2p)
            plan = ledger.hold(holder, pages)
            if expected is not None:
                assert (plan is None) == (len(expected) < wanted)
                gone = before[ledger.v2p[before] == 0].tolist()
                assert gone == ([] if plan is None else sorted(expected.tolist()))
                compared += plan is not None
        elif what == 4:
            ledger.retain(holder, pages) if chance.random() < 0.5 else ledger.drop(holder)
        elif what == 5:
            ledger.forward_started()
        elif what == 6:
            ledger.forward_finished(int(chance.integers(ledger._finished, ledger.passes + 1)))
        elif what == 7:
            ledger.mirrored(pages[ledger.on_device(pages)])
        elif what == 8:
            if stores and chance.random() < 0.6:
                ledger.copy_finished(stores.pop(0), arriving=False)
            else:
                stores.append(ledger.v2p[pages[ledger.on_device(pages)]])
                ledger.copy_started(stores[-1], arriving=False)
        else:
            ledger.heat.select(pages)
            ledger.read_next(pages[:1])
        assert ledger.obtainable_pages == len(ledger._free) + len(ledger._evictable())
        ledger.check()
    assert compared > 3


@pytest.mark.parametrize("what", ["heat", "use", "taken", "count"])
def test_a_check_finds_what_was_not_told(what: str) -> None:
    """That the order is another one, too, and by looking changes nothing."""
    ledger = Ledger(20, 10)
    ledger.allocate(range(1, 21))
    ledger.hold("a", range(1, 11))
    ledger.mirrored(range(1, 11))
    ledger.drop("a")
    ledger.hold("b", [11])
    ledger.check()
    remembered = ledger.standby._next
    assert remembered.tolist() == list(range(1, 11)) and ledger.standby.known
    ledger.check()
    assert ledger.standby._next is remembered
    if what == "heat":
        ledger.heat.values[5] = 1.0
    elif what == "use":
        ledger._last_use[5] += 1
    elif what == "taken":
        ledger.standby._can_go[ledger.v2p[5]] = False
    else:
        ledger.standby.count += 1
    with pytest.raises(LedgerError, match="what can be given up is wrong"):
        ledger.check()


@pytest.mark.parametrize("seed", range(10))
def test_holders_are_sets(seed: int) -> None:
    chance = np.random.default_rng(seed)
    holders, sets = Holders(50), {name: set[int]() for name in "abc"}
    for _ in range(200):
        name, pages = "abc"[chance.integers(3)], np.unique(chance.integers(0, 50, chance.integers(0, 12)))
        given = chance.permutation(pages)
        what, before = chance.integers(4), sets[name]
        if what < 2:
            assert sorted(holders.add(name, given).tolist()) == sorted(set(pages.tolist()) - before)
            sets[name] = before | set(pages.tolist())
        elif what == 2:
            some = None if chance.random() < 0.2 else [*given.tolist(), 50, 99, -1]  # some that there are not
            assert sorted(holders.remove(name, some).tolist()) == sorted(before & set(before if some is None else some))
            sets[name] = set() if some is None else before - set(some)
        else:
            assert sorted(holders.keep(name, given).tolist()) == sorted(before - set(pages.tolist()))
            sets[name] = before & set(pages.tolist())
        assert {key: set(holders.pages(key).tolist()) for key in holders.names()} == {
            k: v for k, v in sets.items() if v
        }
        assert not holders._mark.any()
