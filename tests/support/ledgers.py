"""Ledgers for tests: made, filled, and read."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from sglang_lsa.memory.ledger import Ledger, Plan


def ledger_with(*pages: int, virtual: int = 8, physical: int = 4) -> Ledger:
    """A ledger whose ``pages`` are allocated."""
    ledger = Ledger(virtual, physical)
    ledger.allocate(pages)
    return ledger


def cached(ledger: Ledger, *pages: int) -> None:
    """Bring ``pages`` in, one after the other, mirror them, and let them go: they stay, held by nobody."""
    for page in pages:
        held(ledger, "passer-by", page)
        ledger.mirrored([page])
        ledger.drop("passer-by")


def held(ledger: Ledger, holder: str, *pages: int) -> Plan:
    plan = ledger.hold(holder, pages)
    assert plan is not None
    return plan


def on_device(ledger: Ledger) -> set[int]:
    return set(np.flatnonzero(ledger.v2p).tolist())


def state(ledger: Ledger) -> dict[str, Any]:
    """Everything the ledger knows, comparable."""
    values = copy.deepcopy(vars(ledger))
    values["heat"] = vars(values["heat"])["values"]
    values["_holders"] = {holder: ledger.held_by(holder) for holder in ledger.holders()}
    del values["standby"]  # follows from the others
    values["_reading"] = [(last, pages.tolist()) for last, pages in values["_reading"]]
    values["_moved"] = [pages.tolist() for pages in values["_moved"]]
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def pairs(side: tuple[np.ndarray, np.ndarray]) -> dict[int, int]:
    return dict(zip(side[0].tolist(), side[1].tolist(), strict=True))


def warm(ledger: Ledger, *pages: int) -> None:
    """Resident sets name these pages, one set after the other: the last is the hottest."""
    for page in pages:
        ledger.heat.select(np.array([page]))


def full_of_held_pages() -> Ledger:
    ledger = ledger_with(1, 2, 3, 4, 5)
    held(ledger, "a", 1, 2, 3, 4)
    ledger.mirrored([1, 2, 3, 4])
    return ledger


def places(ledger: Ledger, *pages: int) -> np.ndarray:
    return ledger.v2p[list(pages)]
