"""Prompt lookup: a text that repeats a part of its context reads next what follows that part there.

The idea of prompt lookup decoding, for pages instead of draft tokens. Pure; knows neither SGLang nor a device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sglang_lsa.config import MOST_LOOKED_UP

LOOKS = 8
"""Places of what was generated last that are looked up to see whether it repeats the prompt."""
FIRST_LOOKS = 4
"""Of these, evenly among them, before all others: most texts repeat nothing, and are done with them."""
FEW_LOOKS = 4
"""Of so many places one must occur in the prompt, of more two: single ones do by chance, and lists have words of their
own between."""
LONG_ENOUGH = 16
"""Tokens by which occurrences of such a place are told apart."""
COPIES = 1.25
"""Tokens of the prompt that a copy goes over with each that it writes, at most."""
LONGEST = MOST_LOOKED_UP
"""Tokens by which occurrences are told apart; of those that agree in all of them, the latest counts."""
AT_ONCE = 8
"""The latest occurrences that agree in two tokens, which are looked at before all others."""
FEW, MOST = 6, 1024
"""Of occurrences that agree in ``FEW`` tokens the latest ``MOST`` are looked at: a text that repeats itself all over
must not cost time."""


def continued_at(ids: np.ndarray, least: int) -> int | None:
    """Where the end of a text occurred before, and went on.

    Args:
        ids: ``[n]`` tokens of the text.
        least: tokens at its end that must occur as they are, in ``[1, LONGEST]``.

    Returns:
        Position after the longest earlier occurrence, in ``[least, n)``; None without one.
    """
    if len(ids) <= least:
        return None
    if (at := _circle(ids)) is not None:
        return at
    return _longest(ids, np.flatnonzero(ids[:-1] == ids[-1]), least)


def _circle(ids: np.ndarray) -> int | None:
    """The same where the end of a text that goes round in circles is as good an occurrence as any: then the rest of it,
    which takes most of the time of a look, need not be gone through."""
    if len(ids) <= 2 * LONGEST:
        return None
    first = len(ids) - 1 - LONGEST
    ends = np.flatnonzero(ids[first:-1] == ids[-1]) + first
    ends = ends[ids[ends - 1] == ids[-2]][-AT_ONCE:]
    if not len(ends):
        return None
    back = np.arange(LONGEST)
    ends = ends[(ids[ends[:, None] - back] == ids[-1 - back]).all(axis=1)]
    return int(ends[-1]) + 1 if len(ends) else None


def _longest(ids: np.ndarray, ends: np.ndarray, least: int, longest: int = LONGEST) -> int | None:
    """The same, of occurrences of the last token at the positions ``ends``, ascending; told apart by ``longest``."""
    matched, last = 1, len(ids) - 1
    while len(ends) and matched < min(FEW, longest):  # one after the other, as nearly all occurrences end here
        longer = ends[ends.searchsorted(matched) :]
        longer = longer[ids[longer - matched] == ids[last - matched]]
        if not len(longer):
            break
        ends, matched = longer, matched + 1
    else:
        ends, matched = _longer(ids, ends[-MOST:], matched, min(longest, last))
    return int(ends[-1]) + 1 if len(ends) and matched >= least else None


def _longer(ids: np.ndarray, ends: np.ndarray, matched: int, longest: int) -> tuple[np.ndarray, int]:
    """Of occurrences that agree with the end of the text in ``matched`` tokens, those that do in most, at most
    ``longest`` of them, and in how many."""
    last = len(ids) - 1
    if len(ends) and ends[-1] >= longest - 1 and (ids[ends[-1] + 1 - longest :][:longest] == ids[-longest:]).all():
        return ends[-1:], longest  # mostly so where a text goes round in circles
    while len(ends) and matched < longest:
        more = np.arange(matched, min(4 * matched, longest))
        places = ends[:, None] - more
        same = (ids[places] == ids[last - more]) & (places >= 0)
        agree = np.where(same.all(axis=1), len(more), same.argmin(axis=1))
        most = int(agree.max())
        ends, matched = ends[agree == most], matched + most
        if most < len(more):
            break
    return ends, matched


def pages_next(ids: np.ndarray, least: int, tokens: int, page: int) -> np.ndarray:
    """Pages of the ``tokens`` tokens that come next if the text goes on as it did before; empty if nothing tells.

    Args:
        page: tokens of a page.

    Returns:
        Ascending, int64.
    """
    at = continued_at(ids, least)
    if at is None:
        return np.zeros(0, dtype=np.int64)
    return np.arange(at // page, (at + tokens - 1) // page + 1)


@dataclass(frozen=True)
class Repeats:
    """How a text repeats its prompt.

    Attributes:
        at: position in the prompt after what it has repeated last.
        jumps: it goes on elsewhere than there, as a list does, or so few of its tokens are known that it may.
    """

    at: int
    jumps: bool


def repeats(ids: np.ndarray, prompt: int, least: int, tokens: int, ended: bool = True) -> Repeats | None:
    """Whether a text copies its prompt, or lists what is in it; None for one that does neither.

    The end alone does not tell: a list has words of its own between those that it copies.

    Args:
        ids: ``[n]`` tokens of the text.
        prompt: how many of them are the prompt.
        least: as in :func:`continued_at`; of generated tokens, too.
        tokens: that were generated last and are looked at, at ``LOOKS`` places; at ``FIRST_LOOKS`` of them, if none
            of those occurs in the prompt.
        ended: whether the end has occurred before, if :func:`continued_at` was asked; where it has not, other places
            are looked at first.
    """
    ends = range(len(ids), max(prompt + least, len(ids) - tokens + 1) - 1, -max(1, -(-tokens // LOOKS)))

    @functools.cache
    def place(end: int) -> int | None:
        return _longest(ids[:end], np.flatnonzero(ids[:prompt] == ids[end - 1]), least, max(least, LONG_ENOUGH))

    def places(some: Iterable[int]) -> Iterator[tuple[int, int]]:
        for end in some:
            if (at := place(end)) is not None:
                yield end, at

    may = ends if ended else ends[1:]
    if next(places(may[:: max(1, -(-len(may) // FIRST_LOOKS))]), None) is None:
        return None
    last = next(places(ends), None)
    if last is None:
        return None
    first = next(places(end for end in reversed(ends) if end < last[0]), last)  # most need not be looked up
    if first is last and len(ends) > FEW_LOOKS:
        return None
    written, read = last[0] - first[0], last[1] - first[1]
    copies = 0 < read <= COPIES * written and written >= (ends[0] - ends[-1]) / 2  # not two places of one entry
    return Repeats(last[1], not copies)
