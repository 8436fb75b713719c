"""Holders: who needs which pages on the device. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sglang_lsa.memory.device_pages import Pages, ids


class Holders:
    """The pages of each holder, as arrays: sets of them are compared thousands at a time when a window begins.

    Args:
        pages: virtual pages, the padding page included.
    """

    def __init__(self, pages: int):
        self._held: dict[str, Pages] = {}
        self._mark = np.zeros(pages, dtype=bool)
        """False everywhere between two calls."""

    def __bool__(self) -> bool:
        return bool(self._held)

    def names(self) -> list[str]:
        """Who holds anything."""
        return sorted(self._held)

    def pages(self, holder: str) -> Pages:
        """Of a holder, all different, in no particular order; none of one that is not known."""
        return self._held.get(holder, np.zeros(0, dtype=np.int64))

    def add(self, holder: str, pages: Pages) -> Pages:
        """``holder`` holds these too, all different. Returns those that it did not hold before."""
        before = self.pages(holder)
        self._mark[pages] = True
        self._mark[before[self._mark[before]]] = False
        added = pages[self._mark[pages]]
        self._mark[added] = False
        if len(added):
            self._held[holder] = np.concatenate((before, added))
        return added

    def replace(self, holder: str, pages: Iterable[int]) -> None:
        """``holder`` holds these, all different, and nothing else."""
        self._held.pop(holder, None)
        self.add(holder, ids(pages))

    def remove(self, holder: str, pages: Iterable[int] | None) -> Pages:
        """``holder`` holds these no more (None: any). Returns those that it did; others are ignored."""
        if pages is None:
            return self._held.pop(holder, np.zeros(0, dtype=np.int64))
        return self._part(holder, pages, stay=False)

    def keep(self, holder: str, pages: Iterable[int]) -> Pages:
        """``holder`` holds only these of its pages. Returns the others."""
        return self._part(holder, pages, stay=True)

    def _part(self, holder: str, pages: Iterable[int], stay: bool) -> Pages:
        before, named = self.pages(holder), ids(pages)
        named = named[(named >= 0) & (named < len(self._mark))]
        self._mark[named] = True
        kept = self._mark[before] == stay
        self._mark[named] = False
        if kept.any():
            self._held[holder] = before[kept]
        else:
            self._held.pop(holder, None)
        return before[~kept]
