"""DevicePages: which pages of the device pool are free, and when one that was given up becomes so."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Pages = np.ndarray
"""Virtual or physical page ids, int64 ``[n]``."""


class LedgerError(RuntimeError):
    """An invariant of the ledger does not hold; always a bug, never a consequence of load."""


class DevicePages:
    """The free pages of the device pool, ids 1 to ``physical_pages``, and what is in flight over any of them.

    A page given up while a forward pass that may read it, or a copy from or to it, is in flight is in limbo until that
    is done.
    """

    def __init__(self, physical_pages: int):
        self._started = 0
        self._finished = 0
        self._copies = np.zeros(physical_pages + 1, dtype=np.int32)
        self._arriving = np.zeros(physical_pages + 1, dtype=bool)
        self._free = list(range(physical_pages, 0, -1))
        self._limbo: list[tuple[int, int]] = []

    def _free_all(self) -> None:
        """Every page is free again.

        Raises:
            LedgerError: something is in flight.
        """
        if self._started != self._finished:
            raise LedgerError(f"reset during forward pass {self._started}")
        if self._copies.any():
            raise LedgerError(f"reset while {int((self._copies > 0).sum())} pages are being copied")
        self._arriving[:] = False
        self._free = list(range(len(self._copies) - 1, 0, -1))
        self._limbo = []

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

    @property
    def in_limbo(self) -> bool:
        """Whether a page that was given up waits for something in flight."""
        return bool(self._limbo)

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

    # -- inside --------------------------------------------------------------------------------------------------

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


def distinct(pages: Iterable[int], complaint: str) -> Pages:
    """Page ids, each a page that can be handed out, and named once."""
    v = ids(pages)
    if len(np.unique(v)) < len(v) or (v < 1).any():
        raise LedgerError(f"{complaint}: {v.tolist()}")
    return v


def ascending(pages: Pages) -> Pages:
    """The same as numpy's ``unique``, which takes five times as long for the few hundred pages of a set."""
    if len(pages) < 2:  # what a request opens
        return pages
    v = np.sort(pages)
    repeated = v[1:] == v[:-1]
    return v if not repeated.any() else v[np.append(True, ~repeated)]


def ids(pages: Iterable[int]) -> Pages:
    """Page ids as an array."""
    return np.asarray(pages if isinstance(pages, np.ndarray | list | tuple) else list(pages), dtype=np.int64)
