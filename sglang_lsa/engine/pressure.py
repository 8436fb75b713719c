"""When decode finds no device page to grow into: resident sets give some up before a request is retracted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.counts import Counts
from sglang_lsa.engine.failures import kind_and_place
from sglang_lsa.engine.refresh import Refresher
from sglang_lsa.engine.remap import ResidentSets
from sglang_lsa.engine.request import Request
from sglang_lsa.memory.ledger import LedgerError
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_complete, pages_spanned

logger = logging.getLogger(__name__)


class Pressure:
    """Makes resident sets of running requests smaller."""

    def __init__(self, rules: Rules, pager: Pager, sets: ResidentSets, refresher: Refresher, counts: Counts):
        self.rules, self.pager, self.sets = rules, pager, sets
        self.refresher, self.counts = refresher, counts

    def shrink(self, requests: Sequence[Request], wanted: int) -> None:
        """Make resident sets smaller, the largest first and each by half, until ``wanted`` device pages are let go.

        None becomes smaller than ``min_pages``. When that is not enough, requests that still read everything, because
        they asked for that many steps or wait for a set of their own, get their first set now. What was let go can be
        had once no forward pass reads it.
        """
        smaller = [one for one in requests if one.resident.ranks is not None and one.resident.tail_start]
        whole = [one for one in requests if not one.resident.tail_start and self._may_be_pruned(one)]
        smaller.sort(key=lambda request: -len(request.resident.positions))
        whole.sort(key=lambda request: -len(request.pages))
        freed = self._let_go(smaller, self._halve, wanted)
        while whole and freed < wanted:
            count = self._surely_needed(whole, wanted - freed)
            some, whole = whole[:count], whole[count:]
            self._attempt(some, partial(self.refresher.choose_now, some, predict=True))
            freed += self._let_go(some, self._prune, wanted - freed)

    def _let_go(self, requests: Sequence[Request], how: Callable[[Request], object], wanted: int) -> int:
        """Until ``wanted`` pages are let go, of one after the other; returns how many are."""
        freed = 0
        for request in requests:
            if freed >= wanted:
                break
            held = self.pager.ledger.held_pages
            if self._attempt([request], partial(how, request)):
                freed += held - self.pager.ledger.held_pages
        return freed

    def _attempt(self, requests: Sequence[Request], what: Callable[[], object]) -> bool:
        """Whether that worked; if not, these requests keep what they have."""
        try:
            what()
        except LedgerError:
            raise
        except Exception as error:
            rids = ", ".join(request.rid for request in requests)
            self.pager.ranks.failed_together(f"{rids}: {kind_and_place(error)}")
            self.counts.failures += 1
            logger.exception("LSA: shrinking the set of %s failed; it keeps the pages that it has", rids)
            return False
        return True

    def _surely_needed(self, whole: Sequence[Request], wanted: int) -> int:
        """So many of these have to be pruned, however small their sets will be: fewer do not hold ``wanted`` pages that
        nobody else holds."""
        page = self.pager.page
        each = (request.pages[: pages_complete(request.computed, page)] for request in whole)
        most = self.pager.ledger.letting_go(each)
        return next((count for count, gone in enumerate(most, 1) if gone >= wanted), len(whole))

    def _may_be_pruned(self, request: Request) -> bool:
        decodes = request.computed == request.tokens >= self.rules.config.min_context
        return decodes and not request.asked.dense and not request.resident.incomplete

    def _prune(self, request: Request) -> None:
        """Read the set that was chosen for it."""
        self.refresher.load_now(request, urgent=True)
        if request.resident.next is not None and request.resident.next.held:
            request.steps_left = 0  # of those that were to read everything
            self.refresher.switch_now(request)
            self._count(request)

    def _halve(self, request: Request) -> None:
        assert request.resident.ranks is not None
        tail = pages_spanned(request.tokens, self.pager.page) - request.resident.tail_start
        stay = int(np.isposinf(request.resident.ranks).sum())
        size = max(len(request.resident.positions) // 2, self.rules.config.min_pages - tail, stay)
        if size >= len(request.resident.positions):
            return
        kept = np.sort(np.argsort(-request.resident.ranks, kind="stable")[:size])
        self.sets.remap(
            request, request.resident.positions[kept], request.resident.tail_start, request.resident.ranks[kept]
        )
        needed = [request.read_pages()]
        if request.resident.next is not None and request.resident.next.held:
            needed.append(request.resident.next.needed(request.pages))
        self.pager.retain(request.key, np.concatenate(needed))
        self._count(request)

    def _count(self, request: Request) -> None:
        request.story.shrunk += 1
        self.counts.shrunk += 1
