"""Ledger: where every KV page is, who needs it on the device, and when its device page may be reused.

Pure bookkeeping in numpy: no tensors, no copies, no SGLang. Virtual page 0 is SGLang's padding page; it maps to
physical page 0 for ever and belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from sglang_lsa.memory.heat import Heat

Pages = np.ndarray
"""Virtual or physical page ids, int64 ``[n]``."""


NEVER = -1
"""In place of the number of a forward pass."""


class LedgerError(RuntimeError):
    """An invariant of the ledger does not hold; always a bug, never a consequence of load."""


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
class Ledger:
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
        self._started = 0
        self._finished = 0
        self._copies = np.zeros(self.physical_pages + 1, dtype=np.int32)
        self.reset()

    def reset(self) -> None:
        """Forget every page (SGLang flushed its cache). Nobody may hold one."""
        if getattr(self, "_holders", None):
            raise LedgerError(f"reset while {sorted(self._holders)} hold pages")
        if self._started != self._finished:
            raise LedgerError(f"reset during forward pass {self._started}")
        if self._copies.any():
            raise LedgerError(f"reset while {int((self._copies > 0).sum())} pages are being copied")
        self.v2p[:] = 0
        self.p2v[:] = 0
        self._allocated = np.zeros(self.virtual_pages + 1, dtype=bool)
        self._mirrored = np.zeros(self.virtual_pages + 1, dtype=bool)
        self._pins = np.zeros(self.virtual_pages + 1, dtype=np.int32)
        self._last_use = np.zeros(self.virtual_pages + 1, dtype=np.int64)
        self._last_reader = np.zeros(self.virtual_pages + 1, dtype=np.int64)
        self._recalled = np.full(self.virtual_pages + 1, NEVER, dtype=np.int64)
        self._holders: dict[str, set[int]] = {}
        self._generation = np.zeros(self.virtual_pages + 1, dtype=np.int64)
        self._arriving = np.zeros(self.physical_pages + 1, dtype=bool)
        self._free = list(range(self.physical_pages, 0, -1))
        self._limbo: list[tuple[int, int]] = []
        self._clock = 0
        self.heat = Heat(self.virtual_pages + 1)
        self._moved = np.ones(self.virtual_pages + 1, dtype=bool)
        self._any_moved = True

    # -- forward passes ------------------------------------------------------------------------------------------

    def forward_started(self) -> int:
        """A forward pass that may read any page now on the device begins; returns its number."""
        self._started += 1
        return self._started

    @property
    def passes(self) -> int:
        """Number of the last forward pass that started; 0 before the first."""
        return self._started

    def forward_finished(self, number: int) -> None:
        """Forward passes up to ``number`` are done: physical pages given up meanwhile become usable."""
        if number > self._started:
            raise LedgerError(f"forward pass {number} finished, {self._started} started")
        self._finished = max(self._finished, number)
        self._leave_limbo()

    # -- copies --------------------------------------------------------------------------------------------------

    def copy_started(self, physical: Pages, arriving: bool) -> None:
        """A copy from or to these device pages begins; ``arriving``: it brings their content."""
        self._copies[physical] += 1
        if arriving:
            self._arriving[physical] = True

    def copy_finished(self, physical: Pages, arriving: bool) -> None:
        """That copy is done."""
        if (self._copies[physical] < 1).any():
            raise LedgerError(f"a copy of {physical[self._copies[physical] < 1].tolist()} ended that never began")
        self._copies[physical] -= 1
        if arriving:
            self._arriving[physical] = False
        self._leave_limbo()

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
        return self._any_moved

    def take_moved(self) -> Pages:
        """Virtual pages that moved, came to or left the device since the last call."""
        if not self._any_moved:
            return np.zeros(0, dtype=np.int64)
        moved = np.flatnonzero(self._moved)
        self._moved[moved] = False
        self._any_moved = False
        return moved

    # -- virtual pages -------------------------------------------------------------------------------------------

    def allocate(self, pages: Iterable[int]) -> None:
        """SGLang's allocator handed these virtual pages out; they have no content yet."""
        v = _distinct(pages, "allocated twice")
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
        v = _distinct(pages, "released but not allocated")
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
        v = np.unique(_ids(pages))
        if not self._allocated[v].all():
            raise LedgerError(f"held but not allocated: {v[~self._allocated[v]].tolist()}")
        absent = v[self.v2p[v] == 0]
        wanted = len(absent) - len(self._free)
        victims = self._victims(wanted, keep=v) if wanted > 0 else v[:0]
        if len(victims) < wanted:
            return None
        self._free.extend(self._detach(victims).tolist())
        self.evictions += len(victims)
        if len(absent):
            taken = self._free[: -len(absent) - 1 : -1]
            del self._free[-len(absent) :]
            self._map(absent, np.array(taken, dtype=np.int64))
        held = self._holders.setdefault(holder, set()) if len(v) else set()
        added = list(set(v.tolist()) - held)
        held.update(added)
        claimed = int((self._pins[added] == 0).sum())
        self._pins[added] += 1
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
        held = self._holders.get(holder)
        if held is None:
            return 0
        return self._unpin(holder, held, list(held if pages is None else held.intersection(_ids(pages).tolist())))

    def retain(self, holder: str, pages: Iterable[int]) -> int:
        """``holder`` needs none of its pages but these.

        Returns:
            How many pages nobody holds any more.
        """
        held = self._holders.get(holder)
        return 0 if held is None else self._unpin(holder, held, list(held.difference(_ids(pages).tolist())))

    def read_next(self, pages: Pages) -> None:
        """The next forward pass reads these pages, held or not: they stay on the device until it is done."""
        self._last_reader[pages] = self._started + 1

    def substitute(self, holder: str, old: Iterable[int], new: Iterable[int]) -> int:
        """The same tokens now live in other virtual pages (the radix tree already had them): move holds across.

        A device copy moves along when the new page has none, so nothing is recalled.

        Returns:
            How many pages nobody holds any more.
        """
        held, let_go = self._holders.get(holder, set()), 0
        for before, after in zip(_ids(old).tolist(), _ids(new).tolist(), strict=True):
            if before == after:
                continue
            self.heat.move(before, after)
            if self.v2p[before] and not self.v2p[after] and self._pins[before] == (before in held):
                self._map(np.array([after]), self._detach(np.array([before])))
                self._last_use[after], self._last_use[before] = self._last_use[before], 0
                self._last_reader[after] = max(self._last_reader[before], self._started)
            if before in held:
                if not self.v2p[after]:
                    raise LedgerError(f"{after} replaces {before} but is not on the device")
                let_go += self.drop(holder, [before])
                plan = self.hold(holder, [after])
                assert plan is not None, "it is on the device"
                let_go -= plan.claimed
                held = self._holders[holder]
        return let_go

    def mirrored(self, pages: Iterable[int]) -> None:
        """The host mirror now holds the final content of these pages."""
        v = _ids(pages)
        if not (self._allocated[v].all() and (self.v2p[v] > 0).all()):
            raise LedgerError(f"mirrored without a device copy: {v[self.v2p[v] == 0].tolist()}")
        self._mirrored[v] = True

    # -- questions -----------------------------------------------------------------------------------------------

    def held_by(self, holder: str) -> frozenset[int]:
        return frozenset(self._holders.get(holder, ()))

    def holders(self) -> list[str]:
        return sorted(self._holders)

    def is_held(self, pages: Iterable[int]) -> np.ndarray:
        return self._pins[_ids(pages)] > 0

    def is_mirrored(self, pages: Iterable[int]) -> np.ndarray:
        return self._mirrored[_ids(pages)]

    def on_device(self, pages: Iterable[int]) -> np.ndarray:
        """Which of these pages have a place on the device; see :meth:`arriving` for whether they have come."""
        return self.v2p[_ids(pages)] > 0

    def recalled(self, pages: Iterable[int]) -> np.ndarray:
        """How many forward passes had started when each of these pages last came from the host mirror, int64 ``[n]``;
        -1 for pages that never did."""
        return self._recalled[_ids(pages)]

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
        return len(self._free) + len(self._evictable())

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
        mapped = np.flatnonzero(self.v2p)
        physical = self.v2p[mapped]
        limbo = [p for _, p in self._limbo]
        pins = np.zeros_like(self._pins)
        for held in self._holders.values():
            pins[list(held)] += 1
        for holds, what in (
            (self.v2p[0] == 0 and self.p2v[0] == 0, "the padding page is mapped"),
            (len(np.unique(physical)) == len(physical), "two virtual pages share a physical page"),
            ((self.p2v[physical] == mapped).all(), "v2p and p2v disagree"),
            (int((self.p2v > 0).sum()) == len(mapped), "a physical page maps to a page that is not on the device"),
            (self._allocated[mapped].all(), "a page on the device is not allocated"),
            (not self._copies[self._free].any(), "a free physical page is being copied"),
            (not self._mirrored[~self._allocated].any(), "a page that is not allocated has a mirror copy"),
            ((pins == self._pins).all(), "the hold counts are wrong"),
            ((self.v2p[self._pins > 0] > 0).all(), "a held page is not on the device"),
            (
                (self._mirrored | (self.v2p > 0) | ~self._has_content())[self._allocated].all(),
                "a page is nowhere",
            ),
            (
                sorted([*self._free, *limbo, *physical.tolist()]) == list(range(1, self.physical_pages + 1)),
                "a physical page was lost or counted twice",
            ),
            (all(self._holders.values()), "a holder without pages is remembered"),
        ):
            if not holds:
                raise LedgerError(what)

    # -- inside --------------------------------------------------------------------------------------------------

    def _has_content(self) -> np.ndarray:
        """Pages that were on the device at some time since their allocation."""
        return self._last_use > 0

    def _evictable(self) -> Pages:
        """Virtual pages that can be given up now, in no particular order."""
        v = self.p2v[(self.p2v > 0) & (self._copies == 0)]
        return v[(self._pins[v] == 0) & self._mirrored[v] & (self._last_reader[v] <= self._finished)]

    def _victims(self, count: int, keep: Pages) -> Pages:
        """At most ``count`` evictable pages outside ``keep``, the coldest first, of those the least recently used."""
        kept = np.zeros(self.virtual_pages + 1, dtype=bool)
        kept[keep] = True
        candidates = self._evictable()
        candidates = candidates[~kept[candidates]]
        order = np.lexsort((candidates, self._last_use[candidates], self.heat.values[candidates]))
        return candidates[order][:count]

    def _unpin(self, holder: str, held: set[int], gone: list[int]) -> int:
        held.difference_update(gone)
        self._pins[gone] -= 1
        self._last_reader[gone] = np.maximum(self._last_reader[gone], self._started)
        if not held:
            del self._holders[holder]
        return int((self._pins[gone] == 0).sum())

    def _map(self, v: Pages, p: Pages) -> None:
        self.v2p[v] = p
        self.p2v[p] = v
        self._note_moved(v)

    def _detach(self, v: Pages) -> Pages:
        p = self.v2p[v]
        self.v2p[v] = 0
        self.p2v[p] = 0
        self._note_moved(v)
        return p

    def _note_moved(self, v: Pages) -> None:
        self._moved[v] = True
        self._any_moved |= len(v) > 0

    def _give_back(self, p: int) -> None:
        """The content of device page ``p`` is gone."""
        if self._started == self._finished and not self._copies[p]:
            self._free.append(p)
        else:
            self._limbo.append((self._started, p))

    def _leave_limbo(self) -> None:
        """Device pages that nothing in flight touches any more become free."""
        if self._limbo:
            out = [epoch <= self._finished and not self._copies[p] for epoch, p in self._limbo]
            self._free.extend(p for (_, p), free in zip(self._limbo, out, strict=True) if free)
            self._limbo = [entry for entry, free in zip(self._limbo, out, strict=True) if not free]


def _distinct(pages: Iterable[int], complaint: str) -> np.ndarray:
    """Page ids, each a page that can be handed out, and named once."""
    v = _ids(pages)
    if len(np.unique(v)) < len(v) or (v < 1).any():
        raise LedgerError(f"{complaint}: {v.tolist()}")
    return v


def _ids(pages: Iterable[int]) -> np.ndarray:
    return np.asarray(pages if isinstance(pages, np.ndarray | list | tuple) else list(pages), dtype=np.int64)
