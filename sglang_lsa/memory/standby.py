"""Standby: the pages that can be given up, in the order in which they go, looked through once for many holds."""

from __future__ import annotations

import numpy as np

from sglang_lsa.memory.heat import Heat, lowest

FIRST, MORE = 64, 4
"""Of the order, so many pages are found at once at least, and so many times as many whenever these do not do. Finding
some takes hardly longer than finding one; sorting all of a pool takes several times as long."""


class Standby:
    """What was found when the device pool was last looked through for pages that nobody needs.

    A pool has tens of thousands of pages, and every set that is brought in asks twice what can be given up. Holding
    pages only takes some away from that, and changes neither the order nor the worth of the others, so what was found
    holds good from one hold to the next, until something else happens (:meth:`forget`).

    Args:
        places: by virtual page the device page that it lies in, 0 for none; the ledger's.
        lying: by device page the virtual page that lies in it, 0 for none; the ledger's.
        heat, use: by virtual page, what they are ordered by.
    """

    def __init__(self, places: np.ndarray, lying: np.ndarray, heat: Heat, use: np.ndarray):
        self._places, self._lying, self._heat, self._use = places, lying, heat, use
        self._can_go = np.zeros(len(lying), dtype=bool)
        """By device page, whether what lies there was found, and not taken since."""
        self._next = np.zeros(0, dtype=np.int64)
        """Virtual pages, in order: the first ones of those that were left when it was made."""
        self._known, self._heat_changes, self._size = False, 0, FIRST
        self.count = 0
        """Pages that can be given up now."""

    @property
    def known(self) -> bool:
        """Whether what was found holds good."""
        return self._known and self._heat_changes == self._heat.changes

    def forget(self) -> None:
        """Which pages can be given up may have changed, by something else than :meth:`take`."""
        self._known = False

    def found(self, can_go: np.ndarray) -> None:
        """What lies in these device pages is all that can be given up now.

        Args:
            can_go: bool, by device page; it is this object's from now on.
        """
        self._can_go = can_go
        self._next, self.count = self._next[:0], int(np.count_nonzero(can_go))
        self._known, self._heat_changes, self._size = True, self._heat.changes, FIRST

    def take(self, physical: np.ndarray) -> None:
        """What lies in these device pages, all different, is given up, or cannot be any more."""
        if self._known:
            self.count -= int(self._can_go[physical].sum())
            self._can_go[physical] = False

    def first(self, count: int, spared: np.ndarray) -> np.ndarray:
        """At most ``count`` pages, the coldest first, of those the least recently used, of those by their numbers.

        Args:
            spared: virtual pages that must not go, all different.

        Returns:
            Virtual pages, int64.
        """
        theirs = self._places[spared]
        theirs = theirs[self._can_go[theirs]]
        self._can_go[theirs] = False
        found = self._left(self._next)
        if len(found) < min(count, self.count - len(theirs)):
            self._can_go[theirs] = True
            left = self._lying[np.flatnonzero(self._can_go)]
            size = max(self._size, 2 * (count + len(theirs)))
            self._next, self._size = lowest(left, self._heat.values, self._use, size), MORE * size
            self._can_go[theirs] = False
            found = self._left(self._next)
        self._can_go[theirs] = True
        return found[:count]

    def agrees(self, pages: np.ndarray) -> bool:
        """Whether what is remembered, if it holds good, is that these virtual pages can be given up, in their order."""
        if not self.known:
            return True
        here, places = self._left(self._next), self._places[pages]
        order = lowest(pages, self._heat.values, self._use, len(here))
        same = self.count == len(pages) == int(self._can_go.sum()) and bool(self._can_go[places].all())
        return same and np.array_equal(here, order)

    def _left(self, pages: np.ndarray) -> np.ndarray:
        return pages[self._can_go[self._places[pages]]]
