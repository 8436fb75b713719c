"""Ledger: where every KV page is, who needs it on the device, and when its device page may be reused.

Pure bookkeeping in numpy: no tensors, no copies, no SGLang. Virtual page 0 is SGLang's padding page; it maps to
physical page 0 for ever and belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from sglang_lsa.memory.device_pages import DevicePages, LedgerError, Pages, ascending, distinct, ids
from sglang_lsa.memory.heat import Heat
from sglang_lsa.memory.holders import Holders
from sglang_lsa.memory.invariants import broken_invariant
from sglang_lsa.memory.standby import Standby

__all__ = ["NEVER", "Ledger", "LedgerError", "Pages", "Plan"]

NEVER = -1
"""In place of the number of a forward pass."""


@dataclass(frozen=True)
class Plan:
    """What must happen before a set of pages can be read on the device.

    ``recall`` pages have their only copy in the host mirror and must be copied in; ``fresh`` pages have no content
    yet and are about to be written by a forward pass. Pairs of arrays ``(virtual, physical)``, each ``[n]``.
    ``claimed`` is how many pages were held by nobody before.
    """

    recall: tuple[Pages, Pages]
    fresh: tuple[Pages, Pages]
    claimed: int


@dataclass
class Ledger(DevicePages):
    """Maps virtual pages to physical ones.

    A page is *held* by every request that needs it on the device; held pages are never moved. A page held by nobody
    stays where it is until its physical page is wanted, and can be given up only when its mirror copy is complete.
    A physical page given up while a forward pass that may read it, or a copy from or to it, is in flight comes back
    when that is done.

    Args:
        virtual_pages: pages that SGLang's allocator hands out, ids 1 to ``virtual_pages``.
        physical_pages: pages of the device pool, ids 1 to ``physical_pages``.
    """

    virtual_pages: int
    physical_pages: int
    recalls: int = 0
    evictions: int = 0
    v2p: np.ndarray = field(init=False)
    p2v: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if self.physical_pages < 1 or self.virtual_pages < self.physical_pages:
            raise ValueError(
                f"{self.virtual_pages} virtual over {self.physical_pages} physical pages: "
                "the host mirror must hold at least what the device pool holds, and that at least one page"
            )
        self.v2p = np.zeros(self.virtual_pages + 1, dtype=np.int64)
        self.p2v = np.zeros(self.physical_pages + 1, dtype=np.int64)
        DevicePages.__init__(self, self.physical_pages)
        self.reset()

    def reset(self) -> None:
        """Forget every page (SGLang flushed its cache). Nobody may hold one."""
        if holders := getattr(self, "_holders", None):
            raise LedgerError(f"reset while {holders.names()} hold pages")
        self._free_all()
        self.v2p[:] = 0
        self.p2v[:] = 0
        self._allocated = np.zeros(self.virtual_pages + 1, dtype=bool)
        self._mirrored = np.zeros(self.virtual_pages + 1, dtype=bool)
        self._pins = np.zeros(self.virtual_pages + 1, dtype=np.int32)
        self._idle = np.zeros(self.physical_pages + 1, dtype=bool)
        """Device pages with content that is mirrored and that nobody holds. It follows from the others, but a pool has
        tens of thousands of pages, which are looked through whenever somebody wants one."""
        self._last_use = np.zeros(self.virtual_pages + 1, dtype=np.int64)
        self._last_reader = np.zeros(self.virtual_pages + 1, dtype=np.int64)
        self._recalled = np.full(self.virtual_pages + 1, NEVER, dtype=np.int64)
        self._holders = Holders(self.virtual_pages + 1)
        self._generation = np.zeros(self.virtual_pages + 1, dtype=np.int64)
        self._clock = 0
        self.heat = Heat(self.virtual_pages + 1)
        self.standby = Standby(self.v2p, self.p2v, self.heat, self._last_use)
        self._reading: list[tuple[int, Pages]] = []
        """Passes that are not finished, or start next, and pages that passes up to these may read: all pages with a
        ``_last_reader`` that is not finished are there beside it."""
        self._moved: list[Pages] = [np.arange(self.virtual_pages + 1)]

    # -- what is in flight ---------------------------------------------------------------------------------------

    def forward_finished(self, number: int) -> None:
        super().forward_finished(number)
        if self._reading:
            left = [entry for entry in self._reading if entry[0] > self._finished]
            if len(left) < len(self._reading):
                self._reading = left
                self.standby.forget()

    def copy_started(self, physical: Pages, arriving: bool) -> None:
        super().copy_started(physical, arriving)
        self.standby.take(physical)

    def copy_finished(self, physical: Pages, arriving: bool) -> None:
        super().copy_finished(physical, arriving)
        self.standby.forget()

    # -- where content is ----------------------------------------------------------------------------------------

    def arriving(self, pages: Pages) -> np.ndarray:
        """Which of these pages have a place on the device, but not yet their content."""
        return self._arriving[self.v2p[pages]]

    def arrived(self, pages: Pages) -> bool:
        """Whether all of these pages have their content on the device."""
        return bool((self.v2p[pages] > 0).all() and not self.arriving(pages).any())

    def generation(self, pages: Pages) -> np.ndarray:
        """How often each page has been handed out; tells whether it is still the same page."""
        return self._generation[pages]

    @property
    def any_moved(self) -> bool:
        """Whether :meth:`take_moved` has something to tell."""
        return bool(self._moved)

    def take_moved(self) -> Pages:
        """Virtual pages that moved, came to or left the device since the last call, ascending."""
        if not self._moved:
            return np.zeros(0, dtype=np.int64)
        moved, self._moved = ascending(np.concatenate(self._moved)), []
        return moved

    # -- virtual pages -------------------------------------------------------------------------------------------

    def allocate(self, pages: Iterable[int]) -> None:
        """SGLang's allocator handed these virtual pages out; they have no content yet."""
        v = distinct(pages, "allocated twice")
        if self._allocated[v].any():
            raise LedgerError(f"allocated twice: {v[self._allocated[v]].tolist()}")
        self._allocated[v] = True
        self._generation[v] += 1
        self._mirrored[v] = False
        self._last_use[v] = 0
        self._last_reader[v] = 0
        self._recalled[v] = NEVER
        self.heat.forget(v)

    def release(self, pages: Iterable[int]) -> None:
        """SGLang's allocator took these virtual pages back; their content is gone."""
        v = distinct(pages, "released but not allocated")
        if not self._allocated[v].all():
            raise LedgerError(f"released but not allocated: {v[~self._allocated[v]].tolist()}")
        if self._pins[v].any():
            raise LedgerError(f"released while held: {v[self._pins[v] > 0].tolist()}")
        self._allocated[v] = False
        self._mirrored[v] = False
        for physical in self._detach(v[self.v2p[v] > 0]).tolist():
            self._give_back(physical)

    # -- residency -----------------------------------------------------------------------------------------------

    def hold(self, holder: str, pages: Iterable[int]) -> Plan | None:
        """Put ``pages`` on the device for ``holder``, in addition to what it holds already.

        All or nothing: returns None, and changes nothing, when not enough device pages can be had.
        """
        v = ascending(ids(pages))
        if not self._allocated[v].all():
            raise LedgerError(f"held but not allocated: {v[~self._allocated[v]].tolist()}")
        absent = v[self.v2p[v] == 0]
        wanted = len(absent) - len(self._free)
        victims = self._victims(wanted, keep=v) if wanted > 0 else v[:0]
        if len(victims) < wanted:
            return None
        if len(victims):
            given_up = self._unmap(victims)
            self.standby.take(given_up)
            self._free.extend(given_up.tolist())
            self.evictions += len(victims)
        if len(absent):
            taken = self._free[: -len(absent) - 1 : -1]
            del self._free[-len(absent) :]
            self._place(absent, np.array(taken, dtype=np.int64))
        claimed = self._pin(self._holders.add(holder, v))
        self._clock += 1
        self._last_use[v] = self._clock
        recall = absent[self._mirrored[absent]]
        fresh = absent[~self._mirrored[absent]]
        self.recalls += len(recall)
        self._recalled[recall] = self._started
        return Plan((recall, self.v2p[recall]), (fresh, self.v2p[fresh]), claimed)

    def drop(self, holder: str, pages: Iterable[int] | None = None) -> int:
        """``holder`` no longer needs ``pages`` (all of its pages, if None). Unknown holders and pages are ignored.

        Returns:
            How many pages nobody holds any more.
        """
        return self._unpin(self._holders.remove(holder, pages))

    def retain(self, holder: str, pages: Iterable[int]) -> int:
        """``holder`` needs none of its pages but these.

        Returns:
            How many pages nobody holds any more.
        """
        return self._unpin(self._holders.keep(holder, pages))

    def read_next(self, pages: Pages) -> None:
        """The next forward pass reads these pages, held or not: they stay on the device until it is done."""
        self._read_by(self._started + 1, pages)
        self.standby.forget()

    def substitute(self, holder: str, old: Iterable[int], new: Iterable[int]) -> int:
        """The same tokens now live in other virtual pages (the radix tree already had them): move holds across.

        A device copy moves along when the new page has none, so nothing is recalled.

        Returns:
            How many pages nobody holds any more.
        """
        held = set(self._holders.pages(holder).tolist())
        try:
            return self._substitute(held, ids(old), ids(new))
        finally:
            self._holders.replace(holder, held)

    def _substitute(self, held: set[int], old: Pages, new: Pages) -> int:
        let_go = 0
        for before, after in zip(old.tolist(), new.tolist(), strict=True):
            if before == after:
                continue
            self.heat.move(before, after)
            if self.v2p[before] and not self.v2p[after] and self._pins[before] == (before in held):
                self._map(np.array([after]), self._detach(np.array([before])))
                self._last_use[after], self._last_use[before] = self._last_use[before], 0
                self._last_reader[after] = 0  # of what it had before
                self._read_by(max(int(self._last_reader[before]), self._started), np.array([after]))
            if before in held:
                if not self.v2p[after]:
                    raise LedgerError(f"{after} replaces {before} but is not on the device")
                let_go += self._unpin(np.array([before]))
                let_go -= self._pin(np.array([after] if after not in held else [], dtype=np.int64))
                held -= {before}
                held |= {after}
                self._clock += 1
                self._last_use[after] = self._clock
        return let_go

    def mirrored(self, pages: Iterable[int]) -> None:
        """The host mirror now holds the final content of these pages."""
        v = ids(pages)
        if not (self._allocated[v].all() and (self.v2p[v] > 0).all()):
            raise LedgerError(f"mirrored without a device copy: {v[self.v2p[v] == 0].tolist()}")
        self._mirrored[v] = True
        self._note_idle(v)

    # -- questions -----------------------------------------------------------------------------------------------

    def held_by(self, holder: str) -> frozenset[int]:
        return frozenset(self._holders.pages(holder).tolist())

    def holders(self) -> list[str]:
        return self._holders.names()

    def is_held(self, pages: Iterable[int]) -> np.ndarray:
        return self._pins[ids(pages)] > 0

    def letting_go(self, several: Iterable[Pages]) -> Iterator[int]:
        """How many pages nobody would hold any more if holders let go of these one after the other: of each in turn,
        with those before it.

        Args:
            several: of each holder, pages that it holds, each once.
        """
        left, gone = self._pins.copy(), 0
        for pages in several:
            left[pages] -= 1
            gone += int((left[pages] == 0).sum())
            yield gone

    def is_mirrored(self, pages: Iterable[int]) -> np.ndarray:
        return self._mirrored[ids(pages)]

    def on_device(self, pages: Iterable[int]) -> np.ndarray:
        """Which of these pages have a place on the device; see :meth:`arriving` for whether they have come."""
        return self.v2p[ids(pages)] > 0

    def recalled(self, pages: Iterable[int]) -> np.ndarray:
        """How many forward passes had started when each of these pages last came from the host mirror, int64 ``[n]``;
        -1 for pages that never did."""
        return self._recalled[ids(pages)]

    def worth_fetching(self, pages: Pages) -> Pages:
        """Those of ``pages``, given hottest first, that can come to the device without giving up a hotter page."""
        absent = pages[(self.v2p[pages] == 0) & self._mirrored[pages]]
        taken = absent[: len(self._free)]
        more = absent[len(taken) :]
        coldest = np.sort(self.heat.values[self._evictable()])[: len(more)]
        gain = self.heat.values[more[: len(coldest)]] > coldest
        return np.concatenate((taken, more[: int(np.argmin(gain)) if not gain.all() else len(gain)]))

    @property
    def held_pages(self) -> int:
        """Device pages that some request needs; those of requests that share a prefix count once."""
        return int((self._pins > 0).sum())

    @property
    def device_pages(self) -> int:
        """Device pages with content, needed or not."""
        return int((self.v2p[1:] > 0).sum())

    @property
    def host_pages(self) -> int:
        return int(self._mirrored.sum())

    @property
    def allocated_pages(self) -> int:
        return int(self._allocated.sum())

    @property
    def obtainable_pages(self) -> int:
        """Device pages that are free, or would be after giving up pages that nobody holds."""
        return len(self._free) + self._looked_through().count

    @property
    def obtainable_later(self) -> int:
        """Device pages that are free or can be given up once everything in flight is done."""
        v = self.p2v[self.p2v > 0]
        copied = self._mirrored[v] | (self._copies[self.v2p[v]] > 0)
        return len(self._free) + len(self._limbo) + int(((self._pins[v] == 0) & copied).sum())

    def check(self) -> None:
        """Restate every invariant.

        Raises:
            LedgerError: naming the first that does not hold.
        """
        if what := broken_invariant(self):
            raise LedgerError(what)

    # -- inside --------------------------------------------------------------------------------------------------

    def _has_content(self) -> np.ndarray:
        """Pages that were on the device at some time since their allocation."""
        return self._last_use > 0

    def _evictable(self) -> Pages:
        """Virtual pages that can be given up now, in no particular order."""
        p = np.flatnonzero(self._idle)
        v = self.p2v[p]
        return v[(self._last_reader[v] <= self._finished) & (self._copies[p] == 0)]

    def _looked_through(self) -> Standby:
        """What can be given up; the pool is looked through for it, unless that was done and still holds good."""
        if not self.standby.known:
            self.standby.found(self._can_go())
        return self.standby

    def _can_go(self) -> np.ndarray:
        """The same as :meth:`_evictable`, bool by device page: of all the pages that nobody holds, passes in flight may
        read few, and a look at those takes a tenth of the time of a look at all."""
        found = self._idle & (self._copies == 0)
        for _, pages in self._reading:
            found[self.v2p[pages[self._last_reader[pages] > self._finished]]] = False
        return found

    def _victims(self, count: int, keep: Pages) -> Pages:
        """At most ``count`` evictable pages outside ``keep``, the coldest first, of those the least recently used."""
        return self._looked_through().first(count, keep)

    def _pin(self, added: Pages) -> int:
        """Somebody holds these pages, which are on the device, too. Returns how many nobody held before."""
        pins, places = self._pins[added], self.v2p[added]
        self._pins[added] = pins + 1
        self._idle[places] = False
        self.standby.take(places)
        return int((pins == 0).sum())

    def _unpin(self, gone: Pages) -> int:
        """Somebody holds these pages no more. Returns how many nobody holds now."""
        if not len(gone):
            return 0
        pins = self._pins[gone] - 1
        self._pins[gone] = pins
        self._note_idle(gone)
        self._read_by(self._started, gone)
        return int((pins == 0).sum())

    def _map(self, v: Pages, p: Pages) -> None:
        self._place(v, p)
        self._note_idle(v)

    def _place(self, v: Pages, p: Pages) -> None:
        self.v2p[v] = p
        self.p2v[p] = v
        self._note_moved(v)

    def _detach(self, v: Pages) -> Pages:
        self.standby.forget()
        return self._unmap(v)

    def _unmap(self, v: Pages) -> Pages:
        p = self.v2p[v]
        self.v2p[v] = 0
        self.p2v[p] = 0
        self._idle[p] = False
        self._note_moved(v)
        return p

    def _note_idle(self, v: Pages) -> None:
        """Who holds these pages, where they are, or what the mirror has of them has changed."""
        self._idle[self.v2p[v]] = self._mirrored[v] & (self._pins[v] == 0)
        self._idle[0] = False  # where those are that are not on the device
        self.standby.forget()

    def _note_moved(self, v: Pages) -> None:
        if len(v):
            self._moved.append(v)

    def _read_by(self, passes: int, v: Pages) -> None:
        """Forward passes up to this one may read these pages, and perhaps later ones, which were told of before."""
        self._last_reader[v] = np.maximum(self._last_reader[v], passes)
        if passes > self._finished and len(v):
            self._reading.append((passes, v))
