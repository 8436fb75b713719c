"""The window clock: observe -> score -> select -> plan -> recall -> remap -> attend, one line per stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.deferred_scores import Fetch
from sglang_lsa.engine.policies import Policy, Refresh, Request, Window
from sglang_lsa.engine.prompt_lookup import pages_next
from sglang_lsa.engine.selection import (
    Watched,
    affordable,
    always_kept,
    budget_pages,
    expected_coverage,
    select,
    watched,
    widened,
)
from sglang_lsa.engine.sizing import largest_set, set_bounds
from sglang_lsa.memory.ledger import LedgerError
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_complete, pages_spanned
from sglang_lsa.memory.resident_table import ResidentTable

logger = logging.getLogger(__name__)

SCORE_LAG = 2
"""Forward passes between the one whose queries are scored and the one before which the scores are read, on a GPU. By
then the overlap scheduler has waited for the first anyway, so that reading them does not."""
BLIND = ("", "recency", "random")
"""Policies whose scores do not come from what a request looks at."""
NEVER = 1 << 62
"""Steps left of a window that is not followed by another."""


@dataclass(frozen=True)
class Chosen:
    """A resident set below its tail.

    Attributes:
        positions: ascending.
        ranks: scores, but infinite where a page stays whatever its score.
        collapsed: it could have had more pages, but none was worth it: only first and last ones are left.
        widened: it is larger than the budget.
        coverage: share of attention that it is expected to cover; None where scores do not tell.
    """

    positions: np.ndarray
    ranks: np.ndarray
    collapsed: bool
    widened: bool
    coverage: float | None


class Lookahead:
    """Decides, once a window, which pages of each request stay on the device.

    On a CPU a refresh happens at once, between two windows. On a GPU it starts ``lead`` steps before its window begins:
    its scores are queued behind a forward pass, its pages arrive while decode goes on, and the table changes where the
    window begins, or later if the pages are late. Which pages are chosen depends on step numbers, never on timing.

    A refresh that fails costs its request a new set, not its life: the old one stays.

    Args:
        policies: by name; ``full`` needs none.
        lead: decode steps from the start of a refresh to the window that it is for.
        lag: forward passes after which scores are read.
        thresholds: of the policies whose scores are shares of attention.
    """

    def __init__(
        self,
        config: LSAConfig,
        pager: Pager,
        table: ResidentTable,
        policies: Mapping[str, Policy],
        lead: int = 0,
        lag: int = 0,
        thresholds: Mapping[str, float] | None = None,
    ):
        self.config = config
        """The configuration in force: everything else reads it here, so that a change of it reaches all at once."""
        self.pager, self.table, self.policies = pager, table, policies
        self.lead, self.lag, self.thresholds = lead, lag, thresholds or {}
        self.step = 0
        self.running = 0
        self.on_their_way: dict[str, Request] = {}
        self.incomplete: dict[str, Request] = {}
        """Requests that cannot decode before they have a resident set."""
        self.refreshes = 0
        self.stalls = 0
        self.fallbacks = 0
        self.failures = 0
        """Refreshes that ended with an exception; the set before them stayed."""
        self.shrunk = 0
        """Sets made smaller than their budget because the device pool was full."""
        self.widened = 0
        """Sets made larger than their budget because they were expected to cover too little."""
        self.collapsed = 0
        """Sets of first and last pages only, though there was room for more."""
        self.host_seconds = 0.0
        """Time that this process spent on refreshes."""
        self.device_seconds = 0.0
        """Time that scoring took on the device."""

    def begin(self, request: Request) -> None:
        """The prompt is prefilled: the first decode window is predicted from it, as soon as possible, or from the
        first ``dense_steps`` tokens of the answer."""
        request.steps_left, request.computed, request.lead = 0, request.tokens, self.lead
        if request.given is not None:
            self._await_given(request)
            if request.steps_left > self.lead:
                return
        elif request.dense_steps and not request.incomplete:
            # What is predicted during its last steps would hardly know the answer: a quarter must do for the pages.
            request.steps_left, request.lead = request.dense_steps, min(self.lead, request.dense_steps // 4)
            return
        with self._timed():
            self._start(request)

    def end_step(self, requests: Sequence[Request]) -> list[Request]:
        """A decode step is done, or (GPU) queued: returns the requests whose window ends soon, for :meth:`refresh`."""
        self.running = len(requests)
        ending = []
        for request in requests:
            if request.windows and not request.windows[-1].tokens:
                request.windows[-1].tokens = request.tokens
            request.computed = request.tokens
            request.steps_left -= 1
            if request.steps_left <= request.lead and request.next is None:
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

    def await_first(self, request: Request) -> None:
        """Some pages of this request have left the device: it cannot decode before it has a resident set."""
        request.incomplete = True
        self.incomplete[request.key] = request

    def complete_first(self, decoding: Iterable[str]) -> None:
        """These requests are about to decode: those that cannot be read whole get their first set now.

        That may wait for the scores, for device pages and, on the device, for the pages' content.
        """
        if self.incomplete:
            with self._timed():
                for rid in decoding:
                    if rid in self.incomplete:
                        self._complete_first(self.incomplete[rid])

    def _complete_first(self, request: Request) -> None:
        if request.next is None:
            self._start(request)
        for last in (False, True):
            if (new := request.next) is not None and not new.held:
                new.due, new.urgent = self.step, last
                self._advance(request)
                if not new.held and not last:
                    self.pager.settle()
        if request.next is not None:  # sent for, but not here yet
            self.pager.require(request.next.needed(request.pages))
            self._attempt(request, self._switch)
        if request.incomplete:  # nothing worked: what its tail holds is all that is sure to be there
            self._keep_tail(request)

    def forget(self, request: Request) -> None:
        """The request is gone."""
        self.on_their_way.pop(request.key, None)
        self.incomplete.pop(request.key, None)

    # -- a refresh, stage by stage -------------------------------------------------------------------------------

    def _start(self, request: Request, predict: bool = False) -> None:
        """Queue what predicts the next resident set.

        Args:
            predict: also where the request names its sets itself; those stay for their time.
        """
        request.window += 1
        self.refreshes += 1
        complete, context = pages_complete(request.computed), pages_spanned(request.computed)
        new = Refresh(request.computed, complete, context, due=self.step, scores=None, asked=self.pager.ledger.passes)
        if request.given and not predict:
            given = request.given.popleft()
            new.positions, new.tail_start = np.array(given.positions, dtype=np.int64), given.tail_start
        elif not request.dense and (request.incomplete or request.tokens >= self.config.min_context):
            new.scores = self.score(request, complete)
            new.due += self.lag
        request.next = new
        self.on_their_way[request.key] = request
        if new.due <= self.step:
            self._advance(request)

    def _advance(self, request: Request) -> None:
        """Take the refresh of ``request`` as far as it can go now."""
        self._attempt(request, self._choose_and_recall)
        if request.next is not None and request.next.held and request.steps_left <= 0:
            self._attempt(request, self._switch_when_here)

    def _choose_and_recall(self, request: Request, new: Refresh) -> None:
        if new.held or self.step < new.due:
            return
        if new.positions is None:
            self._choose(request, new)
        new.held = self._recall(request, new)
        if not new.held and self._can_wait(request, new):
            return
        new.held = new.held or self._recall_less(request, new)
        if new.held:
            self.pager.reservations.settle(request.key)  # what admission promised for a first set is held
        else:
            self._stall(request)
            self._end(request)  # the old set stays for one more window

    def _can_wait(self, request: Request, new: Refresh) -> bool:
        """Whether there is time to try again before the next step; what is in flight now can be had then (GPU)."""
        return self.lag > 0 and not new.urgent and (request.incomplete or request.steps_left > request.lead // 2)

    def _switch_when_here(self, request: Request, new: Refresh) -> None:
        if self.pager.arrived(needed := new.needed(request.pages)):
            self._switch(request, new)
        elif not new.late and not request.incomplete:
            new.late = True
            self.pager.count_late(needed)
            self._stall(request)  # the old set stays until the pages are there

    def score(self, request: Request, complete: int) -> Fetch:
        """Scores of the first ``complete`` pages. A policy that fails costs the window its prediction, no more."""
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
            fetch = Fetch.of(self.policies["recency"].score(request, pages))
            fetch.failed = True
            return fetch

    def _choose(self, request: Request, new: Refresh) -> None:
        """Which of the complete pages to keep, and where the tail starts."""
        new.positions = np.zeros(0, dtype=np.int64)
        if new.scores is None:
            return
        scores = new.scores.values()
        self.device_seconds += new.scores.device_seconds
        new.values = np.where(np.isnan(scores), -np.inf, scores)
        policy = "" if new.scores.failed else request.policy
        prompt = pages_spanned(request.prompt_tokens)
        upcoming = self._upcoming(request, new) if policy not in BLIND else ()
        found = self.choose(new.values, new.context, request.budget, policy, prompt, upcoming)
        new.positions, new.ranks = found.positions, found.ranks
        unscored = np.isposinf(new.ranks) | np.isin(new.positions, upcoming)
        new.tail_start = new.complete
        if request.watch:
            new.watched = watched(request.watch, new.values, new.positions, unscored)
        request.coverage = found.coverage
        request.widened += found.widened
        self.widened += found.widened
        self.collapsed += found.collapsed
        if found.collapsed and not request.collapsed:
            logger.warning(
                "LSA: no page of %s scored above the threshold, so that it reads its first and last pages only; an "
                "answer from elsewhere is lost: lower --lsa-threshold, or use another policy",
                request.rid,
            )
        request.collapsed += found.collapsed

    def _upcoming(self, request: Request, new: Refresh) -> np.ndarray:
        """Complete pages that the request reads next if it goes on copying; what is known depends on steps only."""
        if not request.prompt_lookup:
            return np.zeros(0, dtype=np.int64)
        steps = self.lead + self.config.window
        pages = pages_next(request.text(new.computed), request.prompt_lookup, steps)
        return pages[pages < new.complete]

    def choose(
        self,
        scores: np.ndarray,
        context: int,
        budget: float,
        policy: str = "",
        prompt: int = 0,
        upcoming: Sequence[int] | np.ndarray = (),
    ) -> Chosen:
        """The best pages within the budget, and within what the device pool is meant for.

        Args:
            scores: ``[complete]``.
            context: pages of the request, a partly filled last one included.
            budget: fraction of them.
            policy: whose scores these are.
            prompt: pages of its prompt.
            upcoming: pages that come before all that are there for their score, the first of them first.
        """
        scores = np.where(np.isnan(scores), -np.inf, scores)
        share, least = self._bounds(context, budget)
        bound = budget_pages(context, share, least)
        sizes = {"sink_pages": self.config.sink_pages, "recent_pages": self.config.recent_pages}
        sizes |= {"prompt": prompt, "prompt_pages": self.config.prompt_pages}
        stay = always_kept(context, bound, **sizes)
        size = bound
        if policy in self.thresholds and self.config.fallback_budget:
            most = budget_pages(context, *self._bounds(context, max(budget, self.config.fallback_budget)))
            size = widened(scores, stay, bound, most, self.config.min_coverage)
        threshold = self._threshold(policy)
        wanted = scores.copy()
        wanted[np.asarray(upcoming, dtype=np.int64)] = np.finfo(wanted.dtype).max * np.linspace(1, 0.5, len(upcoming))
        positions = select(wanted, context, budget=share, min_pages=size, threshold=threshold, **sizes)
        collapsed = size < context and bool(stay[positions].all()) and int(stay.sum()) < bound
        coverage = expected_coverage(scores, positions, stay) if policy in self.thresholds else None
        ranks = np.where(stay[positions], np.inf, wanted[positions])
        return Chosen(positions, ranks, collapsed, size > bound, coverage)

    def _threshold(self, policy: str) -> float:
        """Configured, or the policy's own."""
        return self.thresholds.get(policy, 0.0) if self.config.threshold is None else self.config.threshold

    def set_pages(self, context: int, budget: float) -> int:
        """Pages of the largest set that is predicted for a request of ``context`` pages, its last one included."""
        return budget_pages(context, *self._bounds(context, budget))

    def _bounds(self, context: int, budget: float) -> tuple[float, int]:
        return set_bounds(context, budget, self.config.min_pages, self.largest_set)

    def _recall(self, request: Request, new: Refresh) -> bool:
        """Hold the new set beside the old one, and send for what is not on the device.

        A device page per running request is left for it to grow into. Nothing is held when the set does not fit.
        """
        if new.tail_start == request.tail_start == 0 and not request.incomplete:
            return True  # it holds all of its pages
        return self.pager.hold_if_spare(request.key, new.needed(request.pages), self._spare(request))

    def _recall_less(self, request: Request, new: Refresh) -> bool:
        """The same with what fits: the best of the new pages and, in place of the others, the best of the old set.

        Nothing is held when no new page fits, or fewer than ``min_pages`` in all.
        """
        if new.positions is None or new.ranks is None:
            return False
        wanted = len(new.positions)
        old = np.setdiff1d(request.positions[request.positions < new.complete], new.positions)
        positions, ranks = np.append(new.positions, old), np.append(new.ranks, new.values[old])
        costs = ~self.pager.ledger.is_held(request.pages[positions])
        tail = request.pages[new.tail_start :]
        room = self.pager.room_for(request.key) - self._spare(request) - int((~self.pager.ledger.is_held(tail)).sum())
        kept = affordable(ranks, costs, max(0, room))[:wanted]
        least = 0 if request.incomplete else min(self.config.min_pages - len(tail), wanted)
        fresh = np.isin(positions[kept], request.positions, invert=True).any()
        if room < 0 or len(kept) < least or not (fresh or request.incomplete):
            return False
        order = np.argsort(positions[kept])
        new.positions, new.ranks = positions[kept][order], ranks[kept][order]
        request.shrunk += 1
        self.shrunk += 1
        return self.pager.hold_if_spare(request.key, new.needed(request.pages), self._spare(request))

    def _spare(self, request: Request) -> int:
        return 0 if request.window == 0 else self.running

    def _switch(self, request: Request, new: Refresh) -> None:
        """Let go of the old set and let decode attention read the new one."""
        assert new.positions is not None
        self.remap(request, new.positions, new.tail_start, new.ranks, new.watched)
        request.set_asked = new.asked
        if new.tail_start:
            self.pager.retain(request.key, new.needed(request.pages))
            self.pager.ledger.heat.select(request.pages[new.positions])
        self._end(request)

    def remap(
        self,
        request: Request,
        positions: np.ndarray,
        tail_start: int,
        ranks: np.ndarray | None = None,
        watched: Watched | None = None,
    ) -> None:
        """Let decode attention read the pages at ``positions`` and everything from ``tail_start`` pages on."""
        still_dense = request.tail_start == tail_start == 0
        if not still_dense:
            self.table.remap(request.row, self.pager.ledger.v2p[request.pages[positions]], tail_start)
        request.positions, request.tail_start, request.ranks = positions, tail_start, ranks
        if request.incomplete:
            request.incomplete = False
            del self.incomplete[request.key]
        if request.windows and not request.windows[-1].tokens:
            request.windows.pop()  # no step has read it
        request.windows.append(Window(tail_start, positions, watched=watched))

    def _stall(self, request: Request) -> None:
        request.stalls += 1
        self.stalls += 1

    def _end(self, request: Request) -> None:
        """The clock of the next window starts."""
        length, request.lead = self.next_window(request)
        request.steps_left += length
        request.next = None
        self.on_their_way.pop(request.key, None)
        if request.given is not None:
            self._await_given(request)

    def next_window(self, request: Request) -> tuple[int, int]:
        """Decode steps of the window that begins, and how many before its end the set of the next one is predicted.

        Windows double until they are as long as they may be. The first of those is shorter by a number of the request's
        own, so that requests do not all refresh in the same step.
        """
        whole, number = self.config.window, max(0, request.window)
        first = self.config.first_window or whole
        length, before = (first << min(n, 32) for n in (number, max(0, number - 1)))
        if length < whole:
            return length, min(self.lead, length // 4)
        first_whole = number == 0 or before < whole
        return whole - (request.seed % (whole - self.lead) if first_whole else 0), self.lead

    def _await_given(self, request: Request) -> None:
        assert request.given is not None
        request.steps_left = request.given[0].tokens - 1 - request.computed if request.given else NEVER

    # -- trouble -------------------------------------------------------------------------------------------------

    def _attempt(self, request: Request, stage: Callable[[Request, Refresh], None]) -> None:
        """Run one stage. If it fails, the set that the request reads stays for one more window."""
        new = request.next
        if new is None:
            return
        try:
            stage(request, new)
        except LedgerError:
            raise
        except Exception:
            self.failures += 1
            request.failures += 1
            logger.exception("LSA: refreshing %s failed; it keeps the pages that it has", request.rid)
            self.pager.retain(request.key, request.read_pages())
            self._end(request)

    def _keep_tail(self, request: Request) -> None:
        tail_start = pages_complete(request.computed)
        self.remap(request, np.zeros(0, dtype=np.int64), tail_start)
        self.pager.retain(request.key, request.pages[tail_start:])
        self.pager.reservations.settle(request.key)
        self._stall(request)

    def shrink(self, requests: Sequence[Request], wanted: int) -> None:
        """Make resident sets smaller, the largest first and each by half, until ``wanted`` device pages are let go.

        None becomes smaller than ``min_pages``. When that is not enough, requests that still read everything, because
        they asked for that many steps or wait for a set of their own, get their first set now. What was let go can be
        had once no forward pass reads it.
        """
        freed = 0
        smaller = [request for request in requests if request.ranks is not None and request.tail_start]
        whole = [request for request in requests if not request.tail_start and self._may_be_pruned(request)]
        for request, let_go in (
            *((request, self._halve) for request in sorted(smaller, key=lambda request: -len(request.positions))),
            *((request, self._prune_now) for request in sorted(whole, key=lambda request: -len(request.pages))),
        ):
            if freed >= wanted:
                return
            try:
                freed += let_go(request)
            except LedgerError:
                raise
            except Exception:
                self.failures += 1
                logger.exception("LSA: shrinking the set of %s failed; it keeps the pages that it has", request.rid)

    def _may_be_pruned(self, request: Request) -> bool:
        decodes = request.computed == request.tokens >= self.config.min_context
        return decodes and not request.dense and not request.incomplete

    def _prune_now(self, request: Request) -> int:
        """Returns how many device pages nobody holds any more."""
        held = self.pager.ledger.held_pages
        if request.next is None:
            self._start(request, predict=True)
        if request.next is not None:
            request.next.due, request.next.urgent = self.step, True
            self._attempt(request, self._choose_and_recall)
        if request.next is not None and request.next.held:
            request.steps_left = 0  # of those that were to read everything
            self._attempt(request, self._switch)
            request.shrunk += 1
            self.shrunk += 1
        return held - self.pager.ledger.held_pages

    def _halve(self, request: Request) -> int:
        """Returns how many device pages nobody holds any more."""
        assert request.ranks is not None
        tail = pages_spanned(request.tokens) - request.tail_start
        stay = int(np.isposinf(request.ranks).sum())
        size = max(len(request.positions) // 2, self.config.min_pages - tail, stay)
        if size >= len(request.positions):
            return 0
        kept = np.sort(np.argsort(-request.ranks, kind="stable")[:size])
        held = self.pager.ledger.held_pages
        self.remap(request, request.positions[kept], request.tail_start, request.ranks[kept])
        needed = [request.read_pages()]
        if request.next is not None and request.next.held:
            needed.append(request.next.needed(request.pages))
        self.pager.retain(request.key, np.concatenate(needed))
        request.shrunk += 1
        self.shrunk += 1
        return held - self.pager.ledger.held_pages

    @property
    def largest_set(self) -> float:
        """Pages of the largest resident set that is predicted."""
        return largest_set(self.pager.ledger.physical_pages, self.table.max_pages)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.host_seconds += time.perf_counter() - began
