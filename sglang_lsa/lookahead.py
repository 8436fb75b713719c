"""The window clock: observe -> score -> select -> plan -> recall -> remap -> attend, one line per stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sglang_lsa.config import LSAConfig
from sglang_lsa.pages import pages_complete, pages_spanned
from sglang_lsa.policies import Policy, Request
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.resident_table import ResidentTable
from sglang_lsa.selection import select

logger = logging.getLogger(__name__)


LARGEST_SHARE = 0.5
"""No resident set is predicted larger than this part of the device pool, whatever its budget."""


class Lookahead:
    """Decides, once a window, which pages of each request stay on the device.

    Args:
        pages_of: virtual page ids of a request's first ``tokens`` tokens, int64 ``[pages]``.
        policies: by name; ``full`` needs none.
    """

    def __init__(
        self,
        config: LSAConfig,
        pager: Pager,
        table: ResidentTable,
        policies: Mapping[str, Policy],
        pages_of: Callable[[Request, int], np.ndarray],
    ):
        self.config, self.pager, self.table, self.policies, self.pages_of = config, pager, table, policies, pages_of
        self.refreshes = 0
        self.stalls = 0
        self.fallbacks = 0

    def begin(self, request: Request) -> None:
        """The prompt is prefilled: the first decode window is predicted from it.

        First windows have different lengths, so that requests do not all refresh in the same step.
        """
        self.refresh(request, spare=0)
        request.steps_left = self.config.window - request.seed % self.config.window

    def end_step(self, requests: Sequence[Request]) -> None:
        """A decode step is done: refresh the requests whose window ends with it.

        A device page per running request is left for it to grow into.
        """
        for request in requests:
            request.steps_left -= 1
            if request.steps_left <= 0:
                self.refresh(request, spare=len(requests))
                request.steps_left = self.config.window

    def refresh(self, request: Request, spare: int) -> None:
        """Predict, bring in and switch to the resident set of the next window."""
        request.window += 1
        self.refreshes += 1
        pages = self.pages_of(request, request.tokens)
        positions, tail_start = self.choose(request, pages)
        needed = np.concatenate((pages[positions], pages[tail_start:]))
        if not self.pager.hold_if_spare(request.rid, needed, spare):
            request.stalls += 1
            self.stalls += 1
            return  # the old set stays for one more window
        self.pager.ledger.drop(request.rid, self.pager.ledger.held_by(request.rid) - set(needed.tolist()))
        self.remap(request, positions, tail_start, pages)

    def choose(self, request: Request, pages: np.ndarray) -> tuple[np.ndarray, int]:
        """Positions of the pages to keep among the complete ones, and the position where the tail starts."""
        complete = pages_complete(request.tokens)
        if request.dense or request.tokens < self.config.min_context:
            return np.arange(0), 0
        scores = self.score(request, pages[:complete])
        context = pages_spanned(request.tokens)
        positions = select(
            scores,
            context,
            budget=min(request.budget, self.pager.ledger.physical_pages * LARGEST_SHARE / context),
            min_pages=self.config.min_pages,
            sink_pages=self.config.sink_pages,
            recent_pages=self.config.recent_pages,
            threshold=self.config.threshold,
        )
        return positions, complete

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        """Scores of the complete pages. A policy that fails costs this window its prediction, not the request."""
        try:
            scores = self.policies[request.policy].score(request, pages)
            if len(scores) != len(pages):
                raise ValueError(f"{len(scores)} scores for {len(pages)} pages")
            return scores
        except Exception:
            self.fallbacks += 1
            logger.exception("LSA: scoring %s with %s failed; its most recent pages stay", request.rid, request.policy)
            return self.policies["recency"].score(request, pages)

    def remap(self, request: Request, positions: np.ndarray, tail_start: int, pages: np.ndarray) -> None:
        """Let decode attention read the pages at ``positions`` and everything from ``tail_start`` pages on."""
        request.positions, request.tail_start = positions, tail_start
        request.history.append(positions.tolist())
        self.table.remap(request.row, self.pager.ledger.v2p[pages[positions]], tail_start)
