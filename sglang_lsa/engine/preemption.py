"""What preempting requests would give back to the device pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sglang_lsa.engine.admission import key_of
from sglang_lsa.memory.pager import Pager


def pages_let_go(pager: Pager, requests: Sequence[Any], prefix: np.ndarray) -> Iterator[int]:
    """Device pages that can be had after preempting the first, the first two, ... of ``requests``.

    A page that somebody else holds stays, and one of ``prefix`` is held again at once. The page that each of them may
    open next counts, too: nobody has to be left it.

    Args:
        prefix: int64 ``[n]`` pages of the prompt that they would make room for, as the radix tree has them.
    """
    kept = set(prefix.tolist())
    gone = {key_of(req) for req in requests}
    for holder in pager.ledger.holders():
        if holder not in gone:
            kept |= pager.ledger.held_by(holder)
    # Whoever is preempted later holds its pages until then.
    held = [pager.ledger.held_by(key_of(req)) for req in requests]
    later = [set().union(*held[place + 1 :]) for place in range(len(held))]
    freed: set[int] = set()
    promised = 0
    for place, req in enumerate(requests):
        freed |= held[place] - kept
        promised += 1 + pager.reservations.owed(key_of(req))
        yield len(freed - later[place]) + promised
