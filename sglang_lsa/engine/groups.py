"""Groups: which requests of a decode step read pages of a common prefix together, and which pages. Pure.

A page that several requests keep is read once for each of them, unless one attention call reads it for the queries of
all. Requests over one radix prefix have the same virtual pages at the same positions, so that is what they are known
by: nothing is asked of the tree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST_GROUPS = 16
"""Of a step. Static buffers, and the plans of CUDA graphs, are of this size."""
FEWEST_MEMBERS = 2


@dataclass(frozen=True)
class GroupRules:
    """When reading together is worth it, counted in reads of one page by one request.

    Attributes:
        query_cost: what every query adds to a page that is read for all of them. Reading memory is what takes time
            until a page meets some 128 rows of queries, 32 requests with 4 query heads to a key head; then arithmetic
            takes as long. Half of that, since both overlap. An estimate; nothing was measured.
        least_saved: what a group has to save in a step. A second attention call in every layer, and the merge, take
            about as long as so many pages of an 8B model. An estimate, likewise.
    """

    query_cost: float = 1 / 64
    least_saved: float = 64.0

    def price(self, members: int) -> float:
        """Of a page that is read for so many at once."""
        return 1 + self.query_cost * members


RULES = GroupRules()


class Reader(NamedTuple):
    """A request of the step.

    Attributes:
        prefix: virtual pages that it may share, from its first one on: below its tail, and all complete.
        positions: of the pages below its tail that it chose, ascending.
    """

    prefix: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Some requests, and what is read for all of them at once.

    Attributes:
        members: their places in the step, ascending.
        positions: of the pages that are read together, ascending; every member has the same page at each of them.
        chosen: how often these pages were chosen, all members together.
        saved: reads of a page that this saves in a step, by the rules that formed it.
    """

    members: tuple[int, ...]
    positions: np.ndarray
    chosen: int
    saved: float

    @property
    def saved_reads(self) -> int:
        """Pages that are not read again in a step."""
        return self.chosen - len(self.positions)

    @property
    def added_reads(self) -> int:
        """Pages that members read in a step although they did not choose them."""
        return len(self.members) * len(self.positions) - self.chosen


def form(readers: Sequence[Reader], rules: GroupRules = RULES) -> tuple[Group, ...]:
    """The groups of a step, in the order of their first members; most requests may be in none.

    A page is read for all members if reading it once, for all of their queries, costs less than reading it as often as
    it was chosen. So a member reads all that it chose, and what enough of the others chose of the prefix that all
    share. Where some of them share a longer prefix, either all are one group over what is common to all, or those are,
    whichever saves more. A request is in one group at most: its attention is merged of two parts.

    Args:
        readers: of the step; those that must be left alone have an empty prefix.
    """
    groups = _best(readers, range(len(readers)), 0, rules)
    groups = sorted(groups, key=lambda group: group.saved, reverse=True)[:MOST_GROUPS]
    return tuple(sorted(groups, key=lambda group: group.members))


class Sharing:
    """What would be read for all of a group while its members, one after the other, change what they choose.

    Choices are counted once for all members; what one member asks or changes takes as long as its set is large, however
    many they are.

    Args:
        readers: of the step, as the group was formed of them.
    """

    def __init__(self, readers: Sequence[Reader], group: Group, rules: GroupRules = RULES):
        self._price = rules.price(len(group.members))
        self._common = _common(readers, group.members, 0)
        self._counts = _counted([readers[place].positions for place in group.members], self._common)

    def worth(self, positions: np.ndarray) -> np.ndarray:
        """Positions, ascending, that would be read for all of the group if the member that has ``positions`` chose
        them: those that enough of the others chose without it, or with it."""
        counts = self._counts + 1
        counts[self._below(positions)] -= 1
        return np.flatnonzero(counts > self._price)

    def change(self, before: np.ndarray, after: np.ndarray) -> None:
        """A member that had ``before`` has ``after``; both ascending, without repetition."""
        self._counts[self._below(before)] -= 1
        self._counts[self._below(after)] += 1

    def _below(self, positions: np.ndarray) -> np.ndarray:
        return positions[: np.searchsorted(positions, self._common)]


def own_positions(reader: Reader, group: Group) -> np.ndarray:
    """What is left for a member to read by itself below its tail."""
    after = np.searchsorted(group.positions, reader.positions)  # a third of the time of numpy's setdiff1d
    together = group.positions[np.minimum(after, len(group.positions) - 1)]
    return reader.positions[together != reader.positions]


def all_own_positions(readers: Sequence[Reader], group: Group) -> list[np.ndarray]:
    """:func:`own_positions` of all members of a group, in their order, in little more time than that of a few."""
    chosen = [readers[place].positions for place in group.members]
    flat, beyond = np.concatenate(chosen), int(group.positions[-1]) + 1
    together = np.zeros(beyond + 1, dtype=bool)
    together[group.positions] = True
    own = ~together[np.minimum(flat, beyond)]
    ends = np.cumsum([0, *map(len, chosen)])
    kept = np.concatenate(([0], np.cumsum(own)))[ends].tolist()
    left = flat[own]
    return [left[start:end] for start, end in itertools.pairwise(kept)]


def _best(readers: Sequence[Reader], members: Iterable[int], agreed: int, rules: GroupRules) -> list[Group]:
    """Of requests whose first ``agreed`` pages are the same: one group, or groups of those that agree for longer."""
    members = [place for place in members if len(readers[place].prefix) > agreed]
    if len(members) < FEWEST_MEMBERS:
        return []
    common = _common(readers, members, agreed)
    whole = _group(readers, members, common, rules)
    apart: dict[int, list[int]] = {}
    for place in members:
        if len(readers[place].prefix) > common:
            apart.setdefault(int(readers[place].prefix[common]), []).append(place)
    parts = [group for some in apart.values() for group in _best(readers, some, common, rules)]
    if whole is None or sum(group.saved for group in parts) > whole.saved:
        return parts
    return [whole]


def _common(readers: Sequence[Reader], members: Sequence[int], agreed: int) -> int:
    """So many first pages are the same for all."""
    first, common = readers[members[0]].prefix, min(len(readers[place].prefix) for place in members)
    same = first[agreed:common].tobytes()  # mostly all of it is, which bytes tell in a third of the time
    for place in members[1:]:
        if readers[place].prefix[agreed:common].tobytes() != same:
            differs = readers[place].prefix[agreed:common] != first[agreed:common]
            common = agreed + int(differs.argmax()) if differs.any() else common
            same = first[agreed:common].tobytes()
    return common


def _counted(chosen: Sequence[np.ndarray], common: int) -> np.ndarray:
    """How often each of the first ``common`` positions was chosen; each choice is ascending."""
    return np.bincount(np.concatenate([each[: np.searchsorted(each, common)] for each in chosen]), minlength=common)


def _group(readers: Sequence[Reader], members: Sequence[int], common: int, rules: GroupRules) -> Group | None:
    """These requests over their first ``common`` pages; None if that saves too little."""
    chosen = [readers[place].positions for place in members]
    counts = _counted(chosen, common)
    price = rules.price(len(members))
    positions = np.flatnonzero(counts > price)
    total = int(counts[positions].sum())
    saved = total - price * len(positions)
    if not len(positions) or saved < rules.least_saved:
        return None
    return Group(tuple(members), positions, total, saved)
