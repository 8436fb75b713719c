"""select: from scores that are there to the set that a request reads next, for itself and then for its group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sglang_lsa.engine.choose import Chosen, Rules
from sglang_lsa.engine.choose_together import Ask, choose_all
from sglang_lsa.engine.counts import Counts
from sglang_lsa.engine.grouping import Company
from sglang_lsa.engine.prompt_lookup import Repeats, pages_next, repeats
from sglang_lsa.engine.request import Refresh, Request, State
from sglang_lsa.engine.score import Scorer
from sglang_lsa.engine.selection import watched
from sglang_lsa.engine.window import Clock
from sglang_lsa.memory.ledger import LedgerError
from sglang_lsa.memory.pages import pages_spanned

logger = logging.getLogger(__name__)

Choice = Callable[[np.ndarray | None], Chosen]
"""Chooses a set, with the pages that are common to a group or without, and gives it to its refresh."""


class Asking(NamedTuple):
    """A request whose scores are there, and what is to be chosen for it."""

    request: Request
    new: Refresh
    ask: Ask


class Chooser:
    """Takes refreshes whose scores are there from QUEUED to CHOSEN; knows nothing of where pages are.

    Args:
        page: tokens in one.
    """

    def __init__(self, rules: Rules, clock: Clock, page: int, scorer: Scorer, counts: Counts) -> None:
        self.rules, self.clock, self.page = rules, clock, page
        self.scorer, self.counts = scorer, counts
        self.company: Callable[[Sequence[Request]], Company] | None = None
        """Where sets are chosen for groups: those of requests whose sets were just chosen."""

    def choose_all(self, requests: Sequence[Request]) -> dict[str, Exception]:
        """Choose the sets of these, then of each in turn for its group; returns what went wrong, by request."""
        failed: dict[str, Exception] = {}
        asking: list[Asking] = []
        for request in requests:
            try:
                if (new := request.resident.next) is not None and (ask := self.ask(request, new)) is not None:
                    asking.append(Asking(request, new, ask))
            except LedgerError:
                raise
            except Exception as error:
                failed[request.key] = error
        found: list[Chosen | None] = [None] * len(asking)
        try:
            found[:] = choose_all(self.rules, [one.ask for one in asking])
        except Exception:
            if len(asking) > 1:
                logger.warning("LSA: choosing %d sets at once failed; one by one", len(asking), exc_info=True)
        chosen: list[tuple[Request, Choice]] = []
        for one, its in zip(asking, found, strict=True):
            try:
                chosen.append((one.request, self.take(one, its)))
            except LedgerError:
                raise
            except Exception as error:
                failed[one.request.key] = error
        if self.company is not None and chosen:
            failed |= self._choose_for_groups(chosen, self.company)
        return failed

    def ask(self, request: Request, new: Refresh) -> Ask | None:
        """What is to be chosen; None where scores do not say."""
        if new.state is not State.QUEUED or self.clock.step < new.due:
            return None
        if new.scores is None:
            new.state = State.CHOSEN
            return None
        scores = new.scores.values()
        self.counts.device_seconds += new.scores.device_seconds
        new.values = np.where(np.isnan(scores), -np.inf, scores)
        policy = None if new.scores.failed else self.scorer.policies[request.asked.policy]
        prompt = pages_spanned(request.prompt_tokens, self.page)
        upcoming, repeated = np.zeros(0, dtype=np.int64), None
        if policy is not None and policy.queries and request.asked.prompt_lookup:
            upcoming, repeated = self._looked_up(request, new)
        name = "" if policy is None else request.asked.policy
        widen = request.asked.widen if repeated else 1.0
        follows = repeated.at // self.page if repeated and repeated.jumps else None
        asked = request.asked
        sizes = (upcoming, widen, follows, asked.target)
        return Ask(new.values, new.context, asked.budget, name, prompt, *sizes)

    def take(self, one: Asking, found: Chosen | None) -> Choice:
        """Which of the complete pages to keep, and where the tail starts.

        Args:
            found: what is chosen by scores alone, if that is known already.
        """
        request, new, ask = one
        asked = request.asked

        def give(found: Chosen) -> Chosen:
            new.positions, new.ranks, new.tail_start = found.positions, found.ranks, new.complete
            if asked.watch:
                unscored = np.isposinf(found.ranks) | np.isin(found.positions, ask.upcoming)
                new.watched = watched(asked.watch, new.values, new.positions, unscored)
            request.story.coverage, request.story.expected = found.coverage, found.expected
            return found

        def choice(common: np.ndarray | None) -> Chosen:
            return give(ask.alone(self.rules, common))

        found = choice(None) if found is None else give(found)
        new.state = State.CHOSEN  # and not before: one that could not be chosen is not what the request reads next
        request.story.widened += found.widened
        self.counts.widened += found.widened
        self.counts.collapsed += found.collapsed
        if found.collapsed and not request.story.collapsed:
            logger.warning(
                "LSA: no page of %s scored above the threshold, so that it reads its first and last pages only; an "
                "answer from elsewhere is lost: lower the key threshold (POST /lsa/config), or use another policy",
                request.rid,
            )
        request.story.collapsed += found.collapsed
        return choice

    def _choose_for_groups(
        self, chosen: Sequence[tuple[Request, Choice]], form: Callable[[Sequence[Request]], Company]
    ) -> dict[str, Exception]:
        """The same sets with pages that others of a group read in place of some that are hardly better, one after the
        other; returns what went wrong, by request."""
        try:
            company = form([request for request, _ in chosen])
        except Exception as error:
            return {request.key: error for request, _ in chosen}
        failed: dict[str, Exception] = {}
        for request, choice in chosen:
            new = request.resident.next
            assert new is not None
            alone = new.positions
            try:
                if (common := company.common(request, alone)) is not None:
                    choice(common)
                    company.exchanged(request, alone, new.positions)
                    self.counts.exchanged += int(np.isin(new.positions, alone, invert=True, kind="table").sum())
            except Exception as error:
                failed[request.key] = error
        return failed

    def _looked_up(self, request: Request, new: Refresh) -> tuple[np.ndarray, Repeats | None]:
        """Complete pages that the request reads next if it goes on copying, and how it repeats its prompt, where that
        would widen its set; what is known depends on steps only."""
        least, text = request.asked.prompt_lookup, request.text(new.computed)
        pages = pages_next(text, least, self.clock.lead + self.clock.window, self.page)
        repeated = None
        if request.asked.widen > 1:
            repeated = repeats(text, request.prompt_tokens, least, self.clock.window, ended=len(pages) > 0)
        return pages[pages < new.complete], repeated
