"""A refresh: the next resident set of a request, from its scores to the step that reads it, stage by stage."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np

from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.chooser import Chooser
from sglang_lsa.engine.counts import Counts
from sglang_lsa.engine.failures import kind_and_place
from sglang_lsa.engine.remap import ResidentSets
from sglang_lsa.engine.request import Refresh, Request, State
from sglang_lsa.engine.score import Scorer
from sglang_lsa.engine.selection import affordable
from sglang_lsa.engine.window import Clock
from sglang_lsa.memory.ledger import LedgerError
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_complete, pages_spanned

logger = logging.getLogger(__name__)


class Refresher:
    """Takes every refresh from state to state.

    A refresh that fails costs its request a new set, not its life: the old one stays.
    """

    def __init__(
        self, rules: Rules, clock: Clock, pager: Pager, sets: ResidentSets, scorer: Scorer, counts: Counts
    ) -> None:
        self.rules, self.clock, self.pager, self.sets = rules, clock, pager, sets
        self.scorer, self.counts = scorer, counts
        self.chooser = Chooser(rules, clock, pager.page, scorer, counts)
        self.on_their_way: dict[str, Request] = {}
        self.together = False
        """Pages are sent for by :meth:`_send`."""

    def start(self, requests: Sequence[Request]) -> None:
        """Queue what predicts the next resident sets of these requests, of all in one go, and take them as far as they
        can go now."""
        begun = self._queue(requests)
        self._advance([request for request, new in begun if new.due <= self.clock.step])

    def _queue(self, requests: Sequence[Request], predict: bool = False) -> list[tuple[Request, Refresh]]:
        """Begin refreshes of these requests.

        Args:
            predict: also where a request names its sets itself; those stay for their time.
        """
        begun = [(request, self._begin(request, predict)) for request in requests]
        predicted = [(request, new) for request, new in begun if new.state is State.QUEUED and self._predicts(request)]
        fetched = self.scorer.score_all([request for request, _ in predicted], [new.complete for _, new in predicted])
        for (_, new), scores in zip(predicted, fetched, strict=True):
            new.scores = scores
            new.due += self.clock.lag
        for request, new in begun:
            request.resident.next = new
            self.on_their_way[request.key] = request
        return begun

    def advance(self) -> None:
        """Take every refresh as far as it can go now."""
        step = self.clock.step
        found = [request for request in self.on_their_way.values() if self._can_advance(request, step)]
        if found:
            self._advance(found)

    def can_advance(self, step: int) -> bool:
        """Whether :meth:`advance` would do anything in this step."""
        return any(self._can_advance(request, step) for request in self.on_their_way.values())

    def _begin(self, request: Request, predict: bool) -> Refresh:
        request.window += 1
        self.counts.refreshes += 1
        complete, context = (count(request.computed, self.pager.page) for count in (pages_complete, pages_spanned))
        new = Refresh(request.computed, complete, context, due=self.clock.step, asked=self.pager.ledger.passes)
        if request.given and not predict:
            given = request.given.popleft()
            new.positions, new.tail_start = np.array(given.positions, dtype=np.int64), given.tail_start
            new.state = State.CHOSEN
        return new

    def _predicts(self, request: Request) -> bool:
        """Whether the next set of ``request``, which names none, is chosen by scores; it reads everything else."""
        incomplete = request.resident.incomplete
        return not request.asked.dense and (incomplete or request.tokens >= self.rules.config.min_context)

    def _can_advance(self, request: Request, step: int) -> bool:
        new = request.resident.next
        if new is None or new.state is State.CHOSEN:
            return True
        return new.due <= step if new.state is State.QUEUED else request.steps_left <= 0

    def _advance(self, requests: Sequence[Request]) -> None:
        """Sets are chosen for all, and for those whose window begins the table changes in one go. Then each takes its
        pages in turn, as what is left depends on who comes first; what is not there is sent for together."""
        failed = self.chooser.choose_all(requests)
        ready = self._write_table(requests)
        if 1 < len(ready) == len(requests) and self._switch_all(ready):
            return
        loading: list[Request] = []
        for request in requests:
            if request.key in failed:
                self._fail(request, failed[request.key])
                continue
            new = request.resident.next
            if new is not None and new.state is State.CHOSEN:
                self.together = len(requests) > 1
                try:
                    self._attempt(request, self._load)
                finally:
                    self.together = False
                loading += [request] * new.held
            if request.steps_left <= 0:
                self._send(loading)
                self._attempt(request, self._switch_if_held)
        self._send(loading)

    def _write_table(self, requests: Sequence[Request]) -> list[tuple[Request, Refresh]]:
        """Let decode read the sets of those whose window begins and that hold them; the rest of :meth:`_switch` comes
        in their turn. Where the table refuses, so do they, each for itself. Returns who these are."""
        ready = [
            (request, new)
            for request in requests
            if request.steps_left <= 0
            and (new := request.resident.next)
            and new.held
            and not request.resident.incomplete
        ]
        if len(ready) > 1:
            try:
                self.sets.write_all([(request, new.positions, new.tail_start) for request, new in ready])
                for _, new in ready:
                    new.written = True
            except Exception:
                logger.warning("LSA: the table refused %d sets at once; one by one", len(ready), exc_info=True)
        return ready

    def _send(self, loading: list[Request]) -> None:
        """Send for the pages of these requests in one copy; if that fails, for those of each."""
        try:
            self.pager.send([request.key for request in loading])
        except LedgerError:
            raise
        except Exception as error:
            self.pager.ranks.failed_together(f"recall for {len(loading)} requests: {kind_and_place(error)}")
            logger.warning("LSA: recalls for %d requests at once failed; one by one", len(loading), exc_info=True)
            for request in loading:
                assert request.resident.next is not None
                request.resident.next.state = State.CHOSEN
            for request in loading:
                self._attempt(request, self._load)
        loading.clear()

    def load_now(self, request: Request, urgent: bool) -> None:
        """Send for the next set of ``request``, which :meth:`choose_now` has chosen, without waiting for the step that
        this is due in."""
        if request.resident.next is not None:
            request.resident.next.urgent = urgent
            self._attempt(request, self._load)

    def switch_now(self, request: Request) -> None:
        """Read the next set of ``request``, which is held, from now on."""
        self._attempt(request, self._switch)

    def complete_first(self, requests: Sequence[Request]) -> None:
        """Requests are about to decode that cannot be read whole: they get their first sets now.

        That may wait for the scores, for device pages and, on the device, for the pages' content.
        """
        self.choose_now([one for one in requests if (new := one.resident.next) is None or new.state is State.QUEUED])
        for request in requests:
            for last in (False, True):
                if (new := request.resident.next) is not None and not new.held:
                    self.load_now(request, urgent=last)
                    if request.steps_left <= 0:
                        self._attempt(request, self._switch_if_held)
                    if request.resident.next is new and not new.held and not last:
                        self.pager.settle()
            if request.resident.next is not None:  # sent for, though its window has not begun
                self.switch_now(request)
            if request.resident.incomplete:  # nothing worked: what its tail holds is all that is sure to be there
                self._keep_tail(request)

    def choose_now(self, requests: Sequence[Request], predict: bool = False) -> None:
        """Choose the next sets of these without waiting for the step that they are due in; of all at once, so that
        those of a group look at each other, and groups are formed once.

        Args:
            predict: also where a request that has none on its way names its sets itself; those stay for their time.
        """
        self._queue([request for request in requests if request.resident.next is None], predict)
        for request in requests:
            assert request.resident.next is not None
            request.resident.next.due = self.clock.step
        failed = self.chooser.choose_all(requests)
        for request in requests:
            if request.key in failed:
                self._fail(request, failed[request.key])

    def forget(self, request: Request) -> None:
        """The request is gone."""
        self.on_their_way.pop(request.key, None)

    # -- CHOSEN -> LOADING ---------------------------------------------------------------------------------------

    def _load(self, request: Request, new: Refresh) -> None:
        """Hold the set beside the old one and send for what is not on the device: all of it, or what fits if that
        cannot wait; with no room for either, the old set stays for one more window."""
        if new.state is not State.CHOSEN:
            return
        held = self._hold(request, new)
        if not held and not self._can_wait(request, new):
            if self.pager.fits_later(request.key, new.needed(request.pages), self._spare(request)):
                self.pager.settle()  # how much is still in flight decides nothing
            held = self._hold(request, new) or self._hold_less(request, new)
        if held:
            new.state = State.LOADING
            self.pager.reservations.settle(request.key)  # what admission promised for a first set is held
        elif not self._can_wait(request, new):
            self._stall(request)
            self._end(request)

    def _can_wait(self, request: Request, new: Refresh) -> bool:
        """Whether there is time to try again before the next step; what is in flight now can be had then (GPU)."""
        return (
            self.clock.lag > 0
            and not new.urgent
            and (request.resident.incomplete or request.steps_left > request.lead // 2)
        )

    def _hold(self, request: Request, new: Refresh) -> bool:
        """Hold the new set beside the old one.

        A device page per running request is left for it to grow into. Nothing is held when the set does not fit.
        """
        if new.tail_start == request.resident.tail_start == 0 and not request.resident.incomplete:
            return True  # it holds all of its pages
        return self._hold_all(request, new)

    def _hold_all(self, request: Request, new: Refresh) -> bool:
        needed, spare = new.needed(request.pages), self._spare(request)
        if self.together:
            return self.pager.hold_if_spare(request.key, needed, spare, together=True)
        return self.pager.hold_if_spare(request.key, needed, spare)

    def _hold_less(self, request: Request, new: Refresh) -> bool:
        """The same with what fits: the best of the new pages and, in place of the others, the best of the old set.

        Nothing is held when no new page fits, or fewer than ``min_pages`` in all.
        """
        if new.ranks is None:
            return False
        wanted = len(new.positions)
        old = np.setdiff1d(request.resident.positions[request.resident.positions < new.complete], new.positions)
        positions, ranks = np.append(new.positions, old), np.append(new.ranks, new.values[old])
        costs = ~self.pager.ledger.is_held(request.pages[positions])
        tail = request.pages[new.tail_start :]
        room = self.pager.room_for(request.key) - self._spare(request) - int((~self.pager.ledger.is_held(tail)).sum())
        kept = affordable(ranks, costs, max(0, room))[:wanted]
        least = 0 if request.resident.incomplete else min(self.rules.config.min_pages - len(tail), wanted)
        fresh = np.isin(positions[kept], request.resident.positions, invert=True).any()
        if room < 0 or len(kept) < least or not (fresh or request.resident.incomplete):
            return False
        order = np.argsort(positions[kept])
        new.positions, new.ranks = positions[kept][order], ranks[kept][order]
        request.story.shrunk += 1
        self.counts.shrunk += 1
        return self._hold_all(request, new)

    def _spare(self, request: Request) -> int:
        return 0 if request.window == 0 else self.clock.running

    # -- LOADING -> read -----------------------------------------------------------------------------------------

    def _switch_if_held(self, request: Request, new: Refresh) -> None:
        """Its window begins: read the new set. That its pages are not there yet changes nothing that is decided; the
        device waits for them."""
        if not new.held:
            return
        needed = new.needed(request.pages)
        if request.resident.incomplete and not self.pager.arrived(needed):
            return  # it does not decode yet: nobody waits for it before it does
        self.pager.count_late(needed)
        self.pager.require(needed)
        self._read(request, new, needed)

    def _switch_all(self, ready: Sequence[tuple[Request, Refresh]]) -> bool:
        """The same for all of these, which hold their sets. Returns whether it was done; nothing was if not."""
        needed = [new.needed(request.pages) for request, new in ready]
        together = np.concatenate(needed)
        try:
            self.pager.require(together)
        except LedgerError:
            raise
        except Exception:
            logger.warning("LSA: waiting for %d sets at once failed; one by one", len(ready), exc_info=True)
            return False
        self.pager.count_late(together)
        for (request, _), own in zip(ready, needed, strict=True):
            self._attempt(request, functools.partial(self._read, needed=own))
        return True

    def _switch(self, request: Request, new: Refresh) -> None:
        """Let go of the old set and let decode attention read the new one, from the next kernel on."""
        needed = new.needed(request.pages)
        self.pager.require(needed)
        self._read(request, new, needed)

    def _read(self, request: Request, new: Refresh, needed: np.ndarray) -> None:
        """The same where what is queued from now on may read the set, whose pages are ``needed``."""
        self.sets.remap(request, new.positions, new.tail_start, new.ranks, new.watched, written=new.written)
        request.resident.set_asked = new.asked
        if new.tail_start:
            self.pager.retain(request.key, needed)
            self.pager.ledger.heat.select(request.pages[new.positions])
        self._end(request)

    # -- ends ----------------------------------------------------------------------------------------------------

    def _end(self, request: Request) -> None:
        request.resident.next = None
        self.on_their_way.pop(request.key, None)
        self.clock.next_window(request)

    def _stall(self, request: Request) -> None:
        request.story.stalls += 1
        self.counts.stalls += 1

    def _keep_tail(self, request: Request) -> None:
        tail_start = pages_complete(request.computed, self.pager.page)
        self.sets.remap(request, np.zeros(0, dtype=np.int64), tail_start)
        self.pager.retain(request.key, request.pages[tail_start:])
        self.pager.reservations.settle(request.key)
        self._stall(request)

    def _attempt(self, request: Request, stage: Callable[[Request, Refresh], object]) -> None:
        """Run one stage. If it fails, the set that the request reads stays for one more window."""
        new = request.resident.next
        if new is None:
            return
        try:
            stage(request, new)
        except LedgerError:
            raise
        except Exception as error:
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        """A stage has raised ``error``."""
        self.pager.ranks.failed_together(f"{request.rid}: {kind_and_place(error)}")
        self.counts.failures += 1
        request.story.failures += 1
        logger.error("LSA: refreshing %s failed; it keeps the pages that it has", request.rid, exc_info=error)
        if request.resident.next is not None and request.resident.next.written:
            self.sets.restore(request)
        self.pager.retain(request.key, request.read_pages())
        self._end(request)
