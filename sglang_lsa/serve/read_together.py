"""Which requests read pages together, told when somebody asks: of the groups of the last decode step, as they are.

See ``sglang_lsa.engine.groups`` for what a group is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sglang_lsa.engine.groups import Group, Reader, own_positions
from sglang_lsa.engine.request import Request

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


@dataclass(frozen=True)
class Figures:
    """Of all groups together, as ``groups`` of ``/lsa/status`` has them; zeros where none are formed.

    Attributes:
        now: groups of the last decode step.
        requests: in them.
        pages: that were read once for all of a group.
        chosen_pages: how often these were chosen, all requests together: what is read of them without groups.
        steps: decode steps with groups, since the start.
        summed_groups, summed_requests: groups, and requests in them, of all these steps.
        saved_reads: pages that were not read again in them.
        added_reads: pages that requests read in them without having chosen them.
        exchanged_pages: pages of sets that are there because their group reads them (``group_margin``).
        formed: how often groups were formed, those of batches that share nothing included.
        host_seconds: that took.
    """

    now: int = 0
    requests: int = 0
    pages: int = 0
    chosen_pages: int = 0
    steps: int = 0
    summed_groups: int = 0
    summed_requests: int = 0
    saved_reads: int = 0
    added_reads: int = 0
    exchanged_pages: int = 0
    formed: int = 0
    host_seconds: float = 0.0

    @classmethod
    def of(cls, runtime: LSARuntime) -> Figures:
        """At most 16 groups are added up, and no page is looked at."""
        if (known := runtime.groups) is None:
            return cls()
        now = known.now.groups if known.now is not None else ()
        return cls(
            now=len(now),
            requests=sum(len(group.members) for group in now),
            pages=sum(len(group.positions) for group in now),
            chosen_pages=sum(group.chosen for group in now),
            steps=known.steps,
            summed_groups=known.summed_groups,
            summed_requests=known.summed_members,
            saved_reads=known.saved_reads,
            added_reads=known.added_reads,
            exchanged_pages=runtime.lookahead.counts.exchanged,
            formed=known.formed,
            host_seconds=known.host_seconds,
        )


@dataclass(frozen=True)
class Membership:
    """A request's part in its group.

    Attributes:
        number: of its group, from 0 on; another group may have it after the next decode step.
        members: requests of the group.
        pages: that are read once for all of them.
        added_pages: of these, those that it reads without having chosen them.
        own_pages: that it reads by itself, its tail included. What it chose, ``resident_pages``, is
            ``pages - added_pages + own_pages``.
    """

    number: int
    members: int
    pages: int
    added_pages: int
    own_pages: int

    @classmethod
    def of(cls, request: Request, number: int, group: Group) -> Membership:
        _, resident = request.sizes()
        positions = request.resident.positions
        chosen = len(positions) - len(own_positions(Reader(request.pages, positions), group))
        pages = len(group.positions)
        return cls(number, len(group.members), pages, pages - chosen, resident - chosen)


def running_groups(runtime: LSARuntime) -> list[tuple[Group, list[Request]]]:
    """Groups of the last decode step, each with those of its members that still run; not those of which none does."""
    if (known := runtime.groups) is None:
        return []
    # A key is given again when its request is gone.
    here = [
        (group, [member for member in members if runtime.requests.get(member.key) is member])
        for group, members in known.members()
    ]
    return [(group, members) for group, members in here if members]


def memberships(runtime: LSARuntime, requests: Iterable[Request]) -> dict[str, dict[str, int]]:
    """By the keys of those of ``requests`` that are in a group: a :class:`Membership` as plain values."""
    groups = running_groups(runtime)
    of = {member.key: number for number, (_, members) in enumerate(groups) for member in members}
    return {
        request.key: asdict(Membership.of(request, of[request.key], groups[of[request.key]][0]))
        for request in requests
        if request.key in of
    }
