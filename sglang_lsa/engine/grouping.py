"""Grouping: the groups of the decode steps that are queued now, and what is left for each request to read by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_lsa.engine.groups import (
    RULES,
    Group,
    GroupRules,
    Reader,
    Sharing,
    all_own_positions,
    form,
    own_positions,
)
from sglang_lsa.engine.remap import ResidentSets
from sglang_lsa.engine.request import Request, State
from sglang_lsa.memory.pages import pages_complete
from sglang_lsa.memory.resident_table import ResidentTable


@dataclass(frozen=True, eq=False)
class Grouping:
    """The groups of a batch.

    Attributes:
        groups: at least one.
        pages: of each group the physical pages that are read together, int64.
        order: places in the batch of all members, group after group, int64.
        places: int64 ``[batch]``, where in ``order`` each request is; -1 for one that is in no group.
        own: what each request of the batch reads by itself, by its row.
    """

    groups: tuple[Group, ...]
    pages: tuple[np.ndarray, ...]
    order: np.ndarray
    places: np.ndarray
    own: ResidentTable

    @property
    def sizes(self) -> tuple[int, ...]:
        """Members of each group."""
        return tuple(len(group.members) for group in self.groups)


class Company:
    """The groups of all that are here if each reads next what it has chosen, for those that choose in one step.

    They are formed once. Who is in a group stays as it was while its members exchange pages: an exchange only makes a
    group save more.

    Args:
        choosing: have just chosen their next sets.
        running: all that are here, those or not, in an order that is the same on every rank; those that read everything
            are in no group.
    """

    def __init__(self, choosing: Iterable[Request], running: Iterable[Request], page: int, rules: GroupRules = RULES):
        chose = {request.key: request for request in choosing}
        everyone = list(({request.key: request for request in running} | chose).values())
        readers = [_next_reader(request, page) for request in everyone]
        self._of: dict[str, Sharing] = {}
        for group in form(readers, rules):
            members = [key for place in group.members if (key := everyone[place].key) in chose]
            if members:
                self._of.update(dict.fromkeys(members, Sharing(readers, group, rules)))

    def common(self, request: Request, positions: np.ndarray) -> np.ndarray | None:
        """Which positions would be read for all of its group if this request, which has chosen ``positions``, had
        them in its set; None where it is in no group, or has all of them."""
        if (sharing := self._of.get(request.key)) is None:
            return None
        found = sharing.worth(positions)
        return None if np.isin(found, positions, kind="table").all() else found

    def exchanged(self, request: Request, before: np.ndarray, after: np.ndarray) -> None:
        """It has chosen ``after`` in place of ``before``: what those that come after it see."""
        self._of[request.key].change(before, after)


class Groups:
    """Forms the groups of each batch; formed anew when a request comes, goes, or reads another set.

    Requests at full attention are in no group: what they say stays what it was, to the bit. A page of a group is held
    by a member that chose it, in this batch, so it cannot leave the device before the pass has read it; a member that
    goes takes its choice along.

    Args:
        sets: what the requests read.
    """

    def __init__(self, sets: ResidentSets, rules: GroupRules = RULES):
        table = sets.table
        self.sets, self.rules = sets, rules
        self.own = ResidentTable(table.rows, table.max_pages, table.page, table.table.device)
        self.planning_bytes = 0
        """On the device, of what attention plans with, where it plans there: it says so itself."""
        self.now: Grouping | None = None
        """Of the last decode step."""
        self.steps = self.saved_reads = self.added_reads = 0
        """Decode steps with groups, pages that were not read again in them, and pages that members read without having
        chosen them."""
        self.summed_groups = self.summed_members = 0
        """Groups and requests in them, of each of these steps."""
        self.formed = 0
        self.host_seconds = 0.0
        self._of: tuple[int, tuple[str, ...]] = (-1, ())
        self._requests: Sequence[Request] = ()
        """Of whom ``now`` was formed; some may be gone."""
        self._reads = (0, 0)

    @property
    def nbytes(self) -> int:
        """On the device, what attention plans with included."""
        return self.own.nbytes + self.planning_bytes

    def of(
        self,
        requests: Sequence[Request],
        check: bool = False,
        on_stream: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Grouping | None:
        """Of these, which are about to decode, in this order; None if nothing is worth reading together.

        Args:
            check: see whether they can be read so; reads the device.
            on_stream: inside, kernels are queued behind the forward passes; most steps queue none.

        Raises:
            RuntimeError: see :meth:`check`.
        """
        changes = self.sets.changes
        # Mostly it is the tuple of the step before, and a tuple has the same requests for ever.
        known = type(requests) is tuple and requests is self._requests and changes == self._of[0]
        asked = self._of if known else (changes, tuple(request.key for request in requests))
        if asked != self._of:
            began = time.perf_counter()
            with on_stream():
                self.now = self._form(requests)
            self._of, self.formed = asked, self.formed + 1
            self._requests = requests
            groups = self.now.groups if self.now is not None else ()
            self._reads = sum(group.saved_reads for group in groups), sum(group.added_reads for group in groups)
            self.host_seconds += time.perf_counter() - began
        if self.now is not None:
            self.steps += 1
            self.summed_groups += len(self.now.groups)
            self.summed_members += len(self.now.order)
            self.saved_reads += self._reads[0]
            self.added_reads += self._reads[1]
            if check:
                with on_stream():
                    self.check(requests)
        return self.now

    def members(self) -> list[tuple[Group, list[Request]]]:
        """The groups of the last decode step, each with its members, some of whom may be gone by now."""
        groups = self.now.groups if self.now is not None else ()
        return [(group, [self._requests[place] for place in group.members]) for group in groups]

    def company(self, choosing: Iterable[Request], running: Iterable[Request]) -> Company:
        """Of these, whose next sets were just chosen; see :class:`Company`."""
        return Company(choosing, running, self.own.page, self.rules)

    def forget(self) -> None:
        """Nothing decodes any more."""
        self.now, self._of, self._requests = None, (-1, ()), ()

    def check(self, requests: Sequence[Request]) -> None:
        """See whether these requests, of the last decode step, read all that they chose, and nothing twice.

        Raises:
            RuntimeError: they do not, or a page that they read together is held by none of them, or is not where the
                group has it.
        """
        assert self.now is not None
        ledger = self.sets.ledger
        for group, pages in zip(self.now.groups, self.now.pages, strict=True):
            members = [requests[place] for place in group.members]
            virtual = members[0].pages[group.positions]
            held = set[int]().union(*(ledger.held_by(member.key) for member in members))
            if not held.issuperset(virtual.tolist()) or not np.array_equal(ledger.v2p[virtual], pages):
                raise RuntimeError(f"LSA: {[member.rid for member in members]} read pages together that none holds")
            for member in members:
                if not np.array_equal(member.pages[group.positions], virtual):
                    raise RuntimeError(f"LSA: {member.rid} reads pages of others as its own")
                own = own_positions(_reader(member, self.own.page), group)
                row = self.own.table[member.row, : 2 + len(own)].cpu().numpy()
                expected = [len(own), member.resident.tail_start, *ledger.v2p[member.pages[own]]]
                left_out = (member.resident.tail_start - len(own)) * self.own.page
                if row.tolist() != expected or self.own.shortening[member.row] != left_out:
                    raise RuntimeError(f"LSA: the table of {member.rid} has other pages than its group leaves it")

    def _form(self, requests: Sequence[Request]) -> Grouping | None:
        readers = [_reader(request, self.own.page) for request in requests]
        groups = form(readers, self.rules)
        if not groups:
            return None
        positions, v2p = [reader.positions for reader in readers], self.sets.ledger.v2p
        order = np.array([place for group in groups for place in group.members], dtype=np.int64)
        places = np.full(len(requests), -1, dtype=np.int64)
        places[order] = np.arange(len(order))
        for group in groups:
            for place, own in zip(group.members, all_own_positions(readers, group), strict=True):
                positions[place] = own
        self.own.remap_all(
            np.array([request.row for request in requests], dtype=np.int64),
            [v2p[request.pages[own]] for request, own in zip(requests, positions, strict=True)],
            np.array([request.resident.tail_start for request in requests], dtype=np.int64),
        )
        pages = tuple(v2p[requests[group.members[0]].pages[group.positions]] for group in groups)
        return Grouping(groups, pages, order, places, self.own)


def _reader(request: Request, page: int) -> Reader:
    """What of a request may be shared: complete pages of its prompt below its tail, unless it asked to be left alone.
    Of one that reads everything, nothing is below its tail."""
    resident = request.resident
    return _reader_of(request, resident.positions, resident.tail_start, page)


def _next_reader(request: Request, page: int) -> Reader:
    """The same in its next window, where that is chosen already."""
    new = request.resident.next
    if new is None or new.state is State.QUEUED:
        return _reader(request, page)
    return _reader_of(request, new.positions, new.tail_start, page)


def _reader_of(request: Request, positions: np.ndarray, tail_start: int, page: int) -> Reader:
    shared = min(tail_start, pages_complete(request.prompt_tokens, page)) if request.asked.groups else 0
    return Reader(request.pages[:shared], positions)
