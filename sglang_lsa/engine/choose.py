"""select, by the rules in force: which pages of a request its next set has. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sglang_lsa.config import FULL, LSAConfig, no_auto
from sglang_lsa.engine.group_choice import exchanged
from sglang_lsa.engine.selection import (
    always_kept,
    budget_pages,
    expected_coverage,
    filled,
    free_shares,
    needed_pages,
    told_coverage,
    told_shares,
    widened,
)
from sglang_lsa.engine.sizing import expected_pages, set_bounds
from sglang_lsa.indexer.expectation import NO_EXPECTATION, Expectation


@dataclass
class Rules:
    """What sets are chosen by.

    Attributes:
        config: the configuration in force. Everything else reads it here, so that a change of it reaches all at once.
        largest_set: pages of the largest resident set that is predicted.
        thresholds: of the policies whose scores are shares of attention.
        expectations: of those that know how much of it their sets cover.
        page_tokens: of a page; None for the page that most models have.
    """

    config: LSAConfig
    largest_set: float
    thresholds: Mapping[str, float] = field(default_factory=dict)
    expectations: Mapping[str, Expectation] = field(default_factory=dict)
    page_tokens: int | None = None

    @property
    def least_pages(self) -> int:
        """Pages that a set may have whatever its budget."""
        tokens = self.page_tokens
        return self.config.least_pages() if tokens is None else self.config.least_pages(tokens)

    def set_pages(self, context: int, budget: float) -> int:
        """Pages of the largest set that is predicted for a request of ``context`` pages, its last one included."""
        return budget_pages(context, *self.bounds(context, budget))

    def bounds(self, context: int, budget: float) -> tuple[float, int]:
        """Budget and least pages of a set, within what the device pool is meant for."""
        return set_bounds(context, budget, self.least_pages, self.largest_set)

    def expected_pages(self, context: int, policy: str, budget: float, target: float | None) -> int:
        """Pages that a set of a request of ``context`` pages is expected to take: all that ``budget`` allows, or with a
        ``target`` as many as it took on average where its policy's expectation was measured.

        A number of its own for each request: what other requests choose does not enter.
        """
        bound = self.set_pages(context, budget)
        if target is None or (expectation := self.expectations.get(policy)) is None:
            return bound
        stay = int(self.stays(context, bound, context).sum())
        return expected_pages(expectation, target, context, stay, self.bounds(context, budget)[1], bound)

    def stays(self, context: int, bound: int, prompt: int) -> np.ndarray:
        """Pages that stay in a set of ``bound`` pages whatever their score, see :func:`always_kept`."""
        config = self.config
        return always_kept(context, bound, config.sink_pages, config.recent_pages, prompt, config.prompt_pages)

    def widens(self, policy: str, target: float | None) -> bool:
        """Whether sets of this policy, with this target, are widened until they cover ``min_coverage``."""
        return bool(policy in self.thresholds and self.config.fallback_budget and target is None)

    def no_auto(self, policy: str) -> str | None:
        """Why this policy cannot have a budget of ``auto`` here; None if it can."""
        if policy == FULL or policy in self.expectations:
            return None
        if policy in self.thresholds:
            return NO_EXPECTATION
        return no_auto("a budget of", policy)

    def threshold(self, policy: str) -> float:
        """Configured, or the policy's own."""
        return self.thresholds.get(policy, 0.0) if self.config.threshold is None else self.config.threshold


@dataclass(frozen=True)
class Chosen:
    """A resident set below its tail.

    Attributes:
        positions: ascending.
        ranks: scores, but infinite where a page stays whatever its score.
        collapsed: it could have had more pages, but none was worth it: only first and last ones are left.
        widened: it is larger than the budget, or than it needed to be by its score.
        coverage: share of attention that it is expected to cover; None where scores do not tell.
    """

    positions: np.ndarray
    ranks: np.ndarray
    collapsed: bool
    widened: bool
    coverage: float | None
    expected: float | None = None
    """Share of all attention, to pages that always stay too, that sets with as much of the scores were measured to
    cover; None where that is not known."""


class Size(NamedTuple):
    """How large a set is to be.

    Attributes:
        pages: the growing last one included.
        budgeted: what of them is not added for coverage, or because the request repeats its prompt.
        threshold: scores of pages that are worth a place are above it.
    """

    pages: int
    budgeted: int
    threshold: float


def set_size(
    rules: Rules,
    scores: np.ndarray,
    context: int,
    budget: float,
    policy: str,
    stay: np.ndarray,
    widen: float = 1.0,
    target: float | None = None,
) -> Size:
    """Of the set of a request, by its scores where that is asked for.

    Args: as for :func:`choose`; of ``scores`` none is NaN, and ``stay`` are pages that stay whatever their score.
    """
    config = rules.config
    share, least = rules.bounds(context, budget)
    bound = budget_pages(context, share, least)
    size, threshold = bound, rules.threshold(policy)
    if target is not None and (expectation := rules.expectations.get(policy)) is not None:
        size = needed_pages(scores, stay, least, bound, expectation.told_for(target))
        threshold = config.threshold or 0.0  # the indexer's own says what is worth a page of a fixed budget
    budgeted = size
    if rules.widens(policy, target):
        most = rules.set_pages(context, max(budget, config.fallback_budget or 0.0))
        size = widened(scores, stay, bound, most, config.min_coverage)
    if widen > 1:
        size = max(size, int(min(budgeted * widen, context, rules.largest_set)))
    return Size(size, budgeted, threshold)


def put_first(
    upcoming: Sequence[int] | np.ndarray, complete: int, size: Size, widen: float, follows: int | None
) -> np.ndarray:
    """Pages that come before all that are there for their score, the first of them first, int64.

    Args: as for :func:`choose`, which has ``complete`` pages.
    """
    first = np.asarray(upcoming, dtype=np.int64)
    if widen > 1 and follows is not None:
        ahead = np.arange(follows, min(complete, follows + size.pages - size.budgeted))
        first = np.concatenate((first, np.setdiff1d(ahead, first)))
    return first


def choose(
    rules: Rules,
    scores: np.ndarray,
    context: int,
    budget: float,
    policy: str = "",
    prompt: int = 0,
    upcoming: Sequence[int] | np.ndarray = (),
    widen: float = 1.0,
    follows: int | None = None,
    target: float | None = None,
    common: np.ndarray | None = None,
) -> Chosen:
    """The best pages within the budget, and within what the device pool is meant for.

    Args:
        scores: ``[complete]``; NaN is not worth keeping.
        context: pages of the request, a partly filled last one included.
        budget: fraction of them.
        policy: whose scores these are.
        prompt: pages of its prompt.
        upcoming: pages that come before all that are there for their score, the first of them first.
        widen: how many times the budget's pages the set may have.
        follows: page from which on the added ones are taken; None takes them by their scores.
        target: share of attention that the set is to cover, by the policy's expectation, in as few pages as that
            takes; None, or a policy without one, takes as many as the budget allows.
        common: pages that the request's group would share with it, ascending: of pages that are nearly as good
            (``group_margin``) the set has rather these, as long as it covers the ``target`` if it did, or
            ``min_coverage`` where sets are widened for that; None where there is no group.
    """
    config = rules.config
    scores = np.where(np.isnan(scores), -np.inf, scores)
    # What is added to a set is not for those that stay: as many of them as a set within the budget has.
    stay = rules.stays(context, rules.set_pages(context, budget), prompt)
    expectation = rules.expectations.get(policy)
    sized = set_size(rules, scores, context, budget, policy, stay, widen, target)
    size, budgeted, threshold = sized
    first = put_first(upcoming, len(scores), sized, widen, follows)
    wanted = scores.copy()
    if len(first):
        wanted[first] = np.finfo(wanted.dtype).max * np.linspace(1, 0.5, len(first))
    positions = filled(wanted, stay, size, threshold) if size < context else np.arange(len(scores), dtype=np.int64)
    if common is not None:
        fixed = stay.copy()
        fixed[first] = True  # a page that is looked up later is no reason for one that is looked up first to go
        spare = None
        if target is not None and expectation is not None:  # what was larger than it takes, if anything
            left = told_coverage(scores, positions) - expectation.told_for(target)
            spare = max(left, 0.0), told_shares(scores)
        elif rules.widens(policy, target):  # or it would be widened for what it then gives away
            left = expected_coverage(scores, positions, stay) - config.min_coverage
            spare = max(left, 0.0), free_shares(scores, stay)
        positions = exchanged(positions, wanted, fixed, common, config.group_margin, threshold, spare)
    collapsed = size < context and bool(stay[positions].all()) and int(stay.sum()) < budgeted
    coverage = expected_coverage(scores, positions, stay) if policy in rules.thresholds else None
    expected = expectation.covered(told_coverage(scores, positions)) if expectation is not None else None
    ranks = np.where(stay[positions], np.inf, wanted[positions])
    return Chosen(positions, ranks, collapsed, size > budgeted, coverage, expected)
