"""The window clock: observe -> score -> select -> plan -> recall -> remap -> attend, one line per stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from sglang_lsa.config import LSAConfig
from sglang_lsa.fetch import Fetch
from sglang_lsa.pages import pages_complete, pages_spanned
from sglang_lsa.policies import Policy, Refresh, Request
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.resident_table import ResidentTable
from sglang_lsa.selection import select
from sglang_lsa.sizing import LARGEST_SHARE

logger = logging.getLogger(__name__)

SCORE_LAG = 2
"""Forward passes between the one whose queries are scored and the one before which the scores are read, on a GPU. By
then the overlap scheduler has waited for the first anyway, so that reading them does not."""


class Lookahead:
    """Decides, once a window, which pages of each request stay on the device.

    On a CPU a refresh happens at once, between two windows. On a GPU it starts ``lead`` steps before its window begins:
    its scores are queued behind a forward pass, its pages arrive while decode goes on, and the table changes where the
    window begins, or later if the pages are late. Which pages are chosen depends on step numbers, never on timing.

    Args:
        policies: by name; ``full`` needs none.
        lead: decode steps from the start of a refresh to the window that it is for.
        lag: forward passes after which scores are read.
    """

    def __init__(
        self,
        config: LSAConfig,
        pager: Pager,
        table: ResidentTable,
        policies: Mapping[str, Policy],
        lead: int = 0,
        lag: int = 0,
    ):
        self.config, self.pager, self.table, self.policies = config, pager, table, policies
        self.lead, self.lag = lead, lag
        self.step = 0
        self.running = 0
        self.on_their_way: dict[str, Request] = {}
        self.refreshes = 0
        self.stalls = 0
        self.fallbacks = 0
        self.host_seconds = 0.0
        """Time that this process spent on refreshes."""
        self.device_seconds = 0.0
        """Time that scoring took on the device."""

    def begin(self, request: Request) -> None:
        """The prompt is prefilled: the first decode window is predicted from it, as soon as possible."""
        request.steps_left = 0
        with self._timed():
            self._start(request)

    def end_step(self, requests: Sequence[Request]) -> list[Request]:
        """A decode step is done, or (GPU) queued: returns the requests whose window ends soon, for :meth:`refresh`."""
        self.running = len(requests)
        ending = []
        for request in requests:
            request.steps_left -= 1
            if request.steps_left <= self.lead and request.next is None:
                ending.append(request)
        return ending

    def refresh(self, requests: Sequence[Request]) -> None:
        """Predict the next resident set of each of these."""
        if requests:
            with self._timed():
                for request in requests:
                    self._start(request)

    def begin_step(self) -> None:
        """A forward pass is about to be queued: take every refresh as far as it can go now."""
        self.step += 1
        if self.on_their_way:
            with self._timed():
                for request in list(self.on_their_way.values()):
                    self._advance(request)

    def forget(self, request: Request) -> None:
        """The request is gone."""
        self.on_their_way.pop(request.rid, None)

    # -- a refresh, stage by stage -------------------------------------------------------------------------------

    def _start(self, request: Request) -> None:
        """Queue what predicts the next resident set."""
        request.window += 1
        self.refreshes += 1
        complete, context = pages_complete(request.tokens), pages_spanned(request.tokens)
        if request.dense or request.tokens < self.config.min_context:
            request.next = Refresh(complete, context, due=self.step, scores=None)
        else:
            scores = self._score(request, complete)
            request.next = Refresh(complete, context, due=self.step + self.lag, scores=scores)
        self.on_their_way[request.rid] = request
        if request.next.due <= self.step:
            self._advance(request)

    def _advance(self, request: Request) -> None:
        new = request.next
        assert new is not None
        if new.positions is None:
            if self.step < new.due:
                return
            new.positions, new.tail_start = self._choose(request, new)
            if not self._recall(request, new):
                self._stall(request)
                self._end(request)  # the old set stays for one more window
                return
        if request.steps_left > 0:
            return
        needed = new.needed(request.pages)
        if self.pager.arrived(needed):
            self._switch(request, new, needed)
            self._end(request)
        elif not new.late:
            new.late = True
            self.pager.count_late(needed)
            self._stall(request)  # the old set stays until the pages are there

    def _score(self, request: Request, complete: int) -> Fetch:
        """Scores of the complete pages. A policy that fails costs this window its prediction, not the request."""
        pages = request.pages[:complete]
        try:
            with Fetch.timed(self.pager.device) as fetch:
                fetch.scores = self.policies[request.policy].score(request, pages)
            if len(fetch.scores) != len(pages):
                raise ValueError(f"{len(fetch.scores)} scores for {len(pages)} pages")
            return fetch
        except Exception:
            self.fallbacks += 1
            logger.exception("LSA: scoring %s with %s failed; its most recent pages stay", request.rid, request.policy)
            return Fetch.of(self.policies["recency"].score(request, pages))

    def _choose(self, request: Request, new: Refresh) -> tuple[np.ndarray, int]:
        """Positions of the pages to keep among the complete ones, and the position where the tail starts."""
        if new.scores is None:
            return np.zeros(0, dtype=np.int64), 0
        scores = new.scores.values()
        self.device_seconds += new.scores.device_seconds
        positions = select(
            scores,
            new.context,
            budget=min(request.budget, self.largest_set / new.context),
            min_pages=min(self.config.min_pages, int(self.largest_set)),
            sink_pages=self.config.sink_pages,
            recent_pages=self.config.recent_pages,
            threshold=self.config.threshold,
        )
        return positions, new.complete

    def _recall(self, request: Request, new: Refresh) -> bool:
        """Hold the new set beside the old one, and send for what is not on the device.

        A device page per running request is left for it to grow into.
        """
        if new.scores is None:
            return True  # it holds all of its pages
        needed = new.needed(request.pages)
        return self.pager.hold_if_spare(request.rid, needed, spare=0 if request.window == 0 else self.running)

    def _switch(self, request: Request, new: Refresh, needed: np.ndarray) -> None:
        """Let go of the old set and let decode attention read the new one."""
        assert new.positions is not None
        if new.scores is not None:
            self.pager.ledger.retain(request.rid, needed)
        self.remap(request, new.positions, new.tail_start)

    def remap(self, request: Request, positions: np.ndarray, tail_start: int) -> None:
        """Let decode attention read the pages at ``positions`` and everything from ``tail_start`` pages on."""
        still_dense = request.tail_start == tail_start == 0
        request.positions, request.tail_start = positions, tail_start
        request.history.append(positions.tolist())
        if not still_dense:
            self.table.remap(request.row, self.pager.ledger.v2p[request.pages[positions]], tail_start)

    def _stall(self, request: Request) -> None:
        request.stalls += 1
        self.stalls += 1

    def _end(self, request: Request) -> None:
        """The clock of the next window starts.

        First windows have different lengths, so that requests do not all refresh in the same step.
        """
        spread = request.seed % (self.config.window - self.lead) if request.window == 0 else 0
        request.steps_left += self.config.window - spread
        request.next = None
        self.on_their_way.pop(request.rid, None)

    @property
    def largest_set(self) -> float:
        """Pages of the largest resident set that is predicted."""
        return min(self.pager.ledger.physical_pages * LARGEST_SHARE, self.table.max_pages)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.host_seconds += time.perf_counter() - began
