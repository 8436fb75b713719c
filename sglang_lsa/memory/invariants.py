"""What must hold of a ledger at any time, restated from nothing but its records."""

from __future__ import annotations

from typing import Any

import numpy as np


def broken_invariant(ledger: Any) -> str | None:
    """The first invariant of a ``Ledger`` that does not hold, in words; None when all do."""
    mapped = np.flatnonzero(ledger.v2p)
    physical = ledger.v2p[mapped]
    limbo = [p for _, p in ledger._limbo]
    pins = np.zeros_like(ledger._pins)
    held = [ledger._holders.pages(holder) for holder in ledger.holders()]
    forgotten = ledger._last_reader > ledger._finished
    for _, pages in ledger._reading:
        forgotten[pages] = False
    for pages in held:
        pins[pages] += 1
    for holds, what in (
        (ledger.v2p[0] == 0 and ledger.p2v[0] == 0, "the padding page is mapped"),
        (len(np.unique(physical)) == len(physical), "two virtual pages share a physical page"),
        ((ledger.p2v[physical] == mapped).all(), "v2p and p2v disagree"),
        (int((ledger.p2v > 0).sum()) == len(mapped), "a physical page maps to a page that is not on the device"),
        (ledger._allocated[mapped].all(), "a page on the device is not allocated"),
        (not ledger._copies[ledger._free].any(), "a free physical page is being copied"),
        (not ledger._mirrored[~ledger._allocated].any(), "a page that is not allocated has a mirror copy"),
        ((pins == ledger._pins).all(), "the hold counts are wrong"),
        ((ledger.v2p[ledger._pins > 0] > 0).all(), "a held page is not on the device"),
        (
            (ledger._idle == (ledger._mirrored & (ledger._pins == 0) & (ledger.v2p > 0))[ledger.p2v]).all(),
            "what is idle is wrong",
        ),
        (
            (ledger._mirrored | (ledger.v2p > 0) | ~ledger._has_content())[ledger._allocated].all(),
            "a page is nowhere",
        ),
        (
            sorted([*ledger._free, *limbo, *physical.tolist()]) == list(range(1, ledger.physical_pages + 1)),
            "a physical page was lost or counted twice",
        ),
        (all(map(len, held)), "a holder without pages is remembered"),
        (not forgotten.any(), "it is forgotten that passes in flight may read a page"),
        (ledger.standby.agrees(ledger._evictable()), "what can be given up is wrong"),
    ):
        if not holds:
            return what
    return None
