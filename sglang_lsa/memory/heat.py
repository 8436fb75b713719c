"""Heat: how often, of late, requests selected each page. Orders eviction, and says what to bring in ahead of time."""

from __future__ import annotations

import numpy as np

HALF_LIFE = 1024
"""Selections after which one counts half: a few dozen windows of a few dozen requests."""


class Heat:
    """One number per virtual page, which grows when a resident set names the page and fades with every selection since.

    Instead of making all numbers smaller, each selection adds more than the one before; both orders are the same.

    Args:
        pages: virtual pages, the padding page included.
    """

    def __init__(self, pages: int):
        self.values = np.zeros(pages, dtype=np.float64)
        self._unit = 1.0
        self.changes = 0
        """How often any of them changed, other than of pages that had no content."""

    def select(self, pages: np.ndarray) -> None:
        """A resident set has these virtual pages."""
        self.changes += 1
        self.values[pages] += self._unit
        self._unit *= 2 ** (1 / HALF_LIFE)
        if self._unit > 1e100:
            self.values /= self._unit
            self._unit = 1.0

    def forget(self, pages: np.ndarray) -> None:
        """These pages have no content yet."""
        self.values[pages] = 0.0

    def move(self, old: int, new: int) -> None:
        """The content of ``old`` goes on as ``new``, which may have heat of its own."""
        self.changes += 1
        self.values[new] = max(self.values[new], self.values[old])
        self.values[old] = 0.0

    def relative(self, pages: np.ndarray) -> np.ndarray:
        """Heat of ``pages`` in selections made just now, float64 ``[n]``."""
        return self.values[pages] / self._unit

    def hottest(self, pages: np.ndarray, count: int) -> np.ndarray:
        """At most ``count`` of ``pages`` that were ever selected, hottest first."""
        hot = pages[self.values[pages] > 0]
        return hot[np.argsort(-self.values[hot], kind="stable")][:count]


def lowest(pages: np.ndarray, first: np.ndarray, then: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of ``pages``, those with the lowest numbers, lowest first.

    Args:
        first, then: by page, what they are ordered by; those that are equal in both, by themselves.
    """
    if 0 < count < len(pages):  # only those that may be among them are worth sorting
        numbers = first[pages]
        most = np.partition(numbers, count - 1)[count - 1]
        below, equal = pages[numbers < most], pages[numbers == most]
        left = count - len(below)
        tie = np.partition(then[equal], left - 1)[left - 1]
        pages = np.concatenate((below, equal[then[equal] <= tie]))
    return pages[np.lexsort((pages, then[pages], first[pages]))][:count]
