"""select, by the rules in force: which pages of a request its next set has. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.selection import always_kept, budget_pages, expected_coverage, select, widened
from sglang_lsa.engine.sizing import set_bounds


@dataclass
class Rules:
    """What sets are chosen by.

    Attributes:
        config: the configuration in force. Everything else reads it here, so that a change of it reaches all at once.
        largest_set: pages of the largest resident set that is predicted.
        thresholds: of the policies whose scores are shares of attention.
    """

    config: LSAConfig
    largest_set: float
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def set_pages(self, context: int, budget: float) -> int:
        """Pages of the largest set that is predicted for a request of ``context`` pages, its last one included."""
        return budget_pages(context, *self.bounds(context, budget))

    def bounds(self, context: int, budget: float) -> tuple[float, int]:
        """Budget and least pages of a set, within what the device pool is meant for."""
        return set_bounds(context, budget, self.config.min_pages, self.largest_set)

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
        widened: it is larger than the budget.
        coverage: share of attention that it is expected to cover; None where scores do not tell.
    """

    positions: np.ndarray
    ranks: np.ndarray
    collapsed: bool
    widened: bool
    coverage: float | None


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
    """
    config = rules.config
    scores = np.where(np.isnan(scores), -np.inf, scores)
    share, least = rules.bounds(context, budget)
    bound = budget_pages(context, share, least)
    sizes = {"sink_pages": config.sink_pages, "recent_pages": config.recent_pages}
    sizes |= {"prompt": prompt, "prompt_pages": config.prompt_pages}
    stay = always_kept(context, bound, **sizes)
    size = bound
    if policy in rules.thresholds and config.fallback_budget:
        most = rules.set_pages(context, max(budget, config.fallback_budget))
        size = widened(scores, stay, bound, most, config.min_coverage)
    first = np.asarray(upcoming, dtype=np.int64)
    if widen > 1:
        size = max(size, int(min(bound * widen, context, rules.largest_set)))
        if follows is not None:
            ahead = np.arange(follows, min(len(scores), follows + size - bound))
            first = np.concatenate((first, np.setdiff1d(ahead, first)))
    # What is added is not for those that stay: as many of them as a set within the budget has.
    for name in ("recent_pages", "prompt_pages"):
        sizes[name] = min(sizes[name], bound // 4)
    wanted = scores.copy()
    if len(first):
        wanted[first] = np.finfo(wanted.dtype).max * np.linspace(1, 0.5, len(first))
    positions = select(wanted, context, budget=share, min_pages=size, threshold=rules.threshold(policy), **sizes)
    collapsed = size < context and bool(stay[positions].all()) and int(stay.sum()) < bound
    coverage = expected_coverage(scores, positions, stay) if policy in rules.thresholds else None
    ranks = np.where(stay[positions], np.inf, wanted[positions])
    return Chosen(positions, ranks, collapsed, size > bound, coverage)
