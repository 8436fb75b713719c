"""Makes texts as long in tokens as asked for, where only their characters can be chosen; and says where tokens lie."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

from sglang_lsa.config import PAGE_SIZE

Span = tuple[int, int]
"""Characters of a text: from, to."""


class Fit:
    """How many characters to try next, so that a text has at most ``length`` tokens and at least nine tenths of it.

    Args:
        most: characters that are too many for it.
        tries: how often to try.
        least: characters that are always tried.
    """

    def __init__(self, length: int, most: int, tries: int, least: int = 0):
        self.length, self.tries, self.least = length, tries, least
        self.characters, self.too_few, self.too_many = length * 3, 0, most
        self.tokens = 0
        """Of the last text that was tried."""

    def sizes(self) -> Iterator[int]:
        """Characters to try; :meth:`fits` is to be asked after each."""
        for _ in range(self.tries):
            yield self.characters

    def fits(self, tokens: int) -> bool:
        """Whether a text of so many tokens is long enough and not too long; if it is not, the next one is nearer."""
        self.tokens = tokens
        if self.length * 0.9 <= tokens <= self.length:
            return True
        if tokens < self.length:
            self.too_few = self.characters
        else:
            self.too_many = self.characters
        wanted = max(self.least, int(self.characters * self.length * 0.96 / max(1, tokens)))
        inside = self.too_few < wanted < self.too_many
        self.characters = wanted if inside else (self.too_few + self.too_many) // 2
        return False


def pages_of(spans: Iterable[Span], before: int, starts: Sequence[int]) -> tuple[int, ...]:
    """Pages that spans of a text lie on, ascending.

    Args:
        before: characters of the prompt before the text.
        starts: where in the prompt each token begins.
    """
    pages: set[int] = set()
    for first, stop in spans:
        begin, end = (bisect.bisect_right(starts, before + at) - 1 for at in (first, stop - 1))
        pages.update(range(begin // PAGE_SIZE, end // PAGE_SIZE + 1))
    return tuple(sorted(pages))
