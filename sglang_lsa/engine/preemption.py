"""What preempting requests would give back to the device pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sglang_lsa.memory.pager import Pager


def pages_let_go(pager: Pager, keys: Sequence[str], prefix: np.ndarray) -> Iterator[int]:
    """Device pages that can be had after preempting the first, the first two, ... of these requests.

    A page that somebody else holds stays, and one of ``prefix`` is held again at once. The page that each of them may
    open next counts, too: nobody has to be left it.

    Args:
        keys: names of the requests.
        prefix: int64 ``[n]`` pages of the prompt that they would make room for, as the radix tree has them.
    """
    kept = set(prefix.tolist())
    for holder in pager.ledger.holders():
        if holder not in keys:
            kept |= pager.ledger.held_by(holder)
    # Whoever is preempted later holds its pages until then.
    held = [pager.ledger.held_by(key) for key in keys]
    later = [set().union(*held[place + 1 :]) for place in range(len(held))]
    freed: set[int] = set()
    promised = 0
    for place, key in enumerate(keys):
        freed |= held[place] - kept
        promised += 1 + pager.reservations.owed(key)
        yield len(freed - later[place]) + promised
