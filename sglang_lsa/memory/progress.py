"""Progress: the one door through which it becomes known that forward passes and copies are finished."""

from __future__ import annotations

from typing import NamedTuple


class Done(NamedTuple):
    """How much is finished, counted since the start; each count is of the oldest, without a gap."""

    passes: int
    """Number of the last forward pass that is finished."""
    stores: int
    recalls: int


class Progress:
    """What this rank sees finished is what counts.

    The ledger decides by what is finished, and every rank has its own; so several ranks must take notice of the same
    things in the same step. Then this is the place where they agree on the minimum of every count: at most once for
    every look at what is finished, and not at all while nothing waits for that (:meth:`Pager.poll`).
    """

    def agreed(self, seen: Done) -> Done:
        """What may be taken notice of, when this rank sees ``seen``."""
        return seen

    def restart(self, done: Done) -> None:
        """Nothing is in flight on any rank; counts of ranks may differ by now, so they begin anew at ``done``."""
