"""Forgetting what the device has and nobody needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from sglang_lsa.memory.device_pages import LedgerError


def forget_unheld(ledger: Any) -> None:
    """Give up the device copies of all pages of a ``Ledger`` that nobody holds, and take free pages by their ids from
    now on: what ranks had there before, and in which order they came to it, makes no difference any more.

    Raises:
        LedgerError: something is in flight.
    """
    if ledger._started != ledger._finished or ledger._copies.any():
        raise LedgerError("pages are forgotten while something is in flight")
    ledger._last_reader = np.minimum(ledger._last_reader, ledger._started)
    ledger._free.extend(ledger._detach(ledger._evictable()).tolist())
    ledger._free.sort(reverse=True)
    ledger._last_use[ledger._last_use > 0] = 1
    ledger._clock = 1


def undo_recall(ledger: Any, holders: Iterable[str], virtual: np.ndarray, physical: np.ndarray) -> None:
    """The copy that was to bring these pages of a ``Ledger`` was not queued: they are not on the device after all, and
    ``holders``, for whom alone they came, do not hold them."""
    ledger.copy_finished(physical, arriving=True)
    for holder in holders:
        ledger.drop(holder, virtual)
    ledger._free.extend(ledger._detach(virtual).tolist())
