"""select, of many requests at once: what :func:`choose` says of each, bit for bit. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_lsa.engine.choose import Chosen, Rules, Size, choose, put_first, set_size

FEWEST = 4
"""Requests of one matrix; fewer are chosen for one after the other in less time."""


@dataclass(frozen=True)
class Ask:
    """What :func:`choose` is asked of one request; its arguments, see there."""

    scores: np.ndarray
    context: int
    budget: float
    policy: str = ""
    prompt: int = 0
    upcoming: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    widen: float = 1.0
    follows: int | None = None
    target: float | None = None

    def alone(self, rules: Rules, common: np.ndarray | None = None) -> Chosen:
        """Without the others."""
        sizes = (self.upcoming, self.widen, self.follows, self.target)
        return choose(rules, self.scores, self.context, self.budget, self.policy, self.prompt, *sizes, common=common)


def choose_all(rules: Rules, asks: Sequence[Ask]) -> list[Chosen]:
    """The best pages of each of these requests; nothing of one enters what another gets.

    Requests whose contexts are within a factor of two of each other are rows of one matrix.
    """
    found: dict[int, Chosen] = {}
    rows: dict[tuple[int, np.dtype], list[int]] = {}
    for place, ask in enumerate(asks):
        rows.setdefault((ask.context.bit_length(), ask.scores.dtype), []).append(place)
    for (_, dtype), places in rows.items():
        some = [asks[place] for place in places]
        together = len(some) >= FEWEST and np.issubdtype(dtype, np.floating)
        found.update(zip(places, _rows(rules, some) if together else [ask.alone(rules) for ask in some], strict=True))
    return [found[place] for place in range(len(asks))]


def _rows(rules: Rules, asks: Sequence[Ask]) -> list[Chosen]:
    """The same of requests with scores of one type, as ``[requests, pages]``; a row ends with its request's pages."""
    scores, wanted, stay, sizes = _matrices(rules, asks)
    size, budgeted = (np.array(column) for column in list(zip(*sizes, strict=True))[:2])
    whole = size >= np.array([ask.context for ask in asks])
    stays_in_all = stay.sum(axis=1)
    keep = stay | _best(wanted, stay, size - stays_in_all, np.array([each.threshold for each in sizes]))
    for row, ask, everything in zip(keep, asks, whole.tolist(), strict=True):
        row[len(ask.scores) :] = False
        row[: len(ask.scores)] |= everything
    collapsed = ~whole & ~(keep & ~stay).any(axis=1) & (stays_in_all < budgeted)
    flat, counts = np.flatnonzero(keep), keep.sum(axis=1)
    positions = flat - np.repeat(np.arange(len(asks)) * keep.shape[1], counts)
    ranks = np.where(stay.ravel()[flat], np.inf, wanted.ravel()[flat])
    ends = np.cumsum(counts)
    parts = [slice(*part) for part in zip((ends - counts).tolist(), ends.tolist(), strict=True)]
    coverage = _shares(scores, flat, parts, asks, rules.thresholds, ~stay)
    told = _shares(scores, flat, parts, asks, rules.expectations)
    found = []
    for index, (ask, part) in enumerate(zip(asks, parts, strict=True)):
        share = told.get(index)
        expected = None if share is None else rules.expectations[ask.policy].covered(share)
        own = positions[part].copy(), ranks[part].copy()  # remembered long after the others of this step are gone
        larger = bool(size[index] > budgeted[index])
        found.append(Chosen(*own, bool(collapsed[index]), larger, coverage.get(index), expected))
    return found


def _matrices(rules: Rules, asks: Sequence[Ask]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Size]]:
    """Scores without NaN; the same with those of pages that come first above all others; which pages stay; and how
    large each set is to be."""
    shape = len(asks), max(ask.context for ask in asks)
    scores, stay = np.full(shape, -np.inf, dtype=asks[0].scores.dtype), np.zeros(shape, dtype=bool)
    for row, ask in zip(scores, asks, strict=True):
        row[: len(ask.scores)] = ask.scores
    scores[np.isnan(scores)] = -np.inf
    wanted, sizes = scores, []
    for index, ask in enumerate(asks):
        own, pages = scores[index, : len(ask.scores)], ask.context
        stays = stay[index, :pages] = rules.stays(pages, rules.set_pages(pages, ask.budget), ask.prompt)
        sizes.append(set_size(rules, own, pages, ask.budget, ask.policy, stays, ask.widen, ask.target))
        first = put_first(ask.upcoming, len(own), sizes[-1], ask.widen, ask.follows)
        if len(first):
            wanted = scores.copy() if wanted is scores else wanted
            wanted[index, first] = np.finfo(wanted.dtype).max * np.linspace(1, 0.5, len(first))
    return scores, wanted, stay, sizes


def _shares(
    scores: np.ndarray,
    flat: np.ndarray,
    parts: Sequence[slice],
    asks: Sequence[Ask],
    policies: Container[str],
    free: np.ndarray | None = None,
) -> dict[int, float]:
    """What the sets have of all scores, by row, of requests that ask one of these policies.

    ``told_coverage`` or, of pages that are ``free`` to go, ``expected_coverage`` of each row, added up in the same
    order as there.

    Args:
        flat: places of all pages that were chosen in the flat matrix, of which each row has its part.
        free: bool ``[requests, pages]``.
    """
    rows = [index for index, ask in enumerate(asks) if ask.policy in policies]
    if not rows:
        return {}
    finite = np.isfinite(scores)
    worth = np.where(finite, np.maximum(scores, 0.0), 0.0) if free is None else np.where(free & finite, scores, 0.0)
    chosen, found = worth.ravel()[flat], {}
    for row in rows:
        own = slice(len(asks[row].scores))
        if free is not None and not free[row, own].any():
            found[row] = 1.0
        else:
            total = worth[row, own].sum()
            found[row] = float(chosen[parts[row]].sum() / total) if total > 0 else 0.0
    return found


def _best(scores: np.ndarray, stay: np.ndarray, room: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """As many pages of each row as there is room for: the best above its threshold that do not stay anyway, of equal
    ones the last.

    Args:
        scores, stay: ``[requests, pages]``.
        room: int64 ``[requests]``; none where it is below 0.
        threshold: float64 ``[requests]``.

    Returns:
        bool ``[requests, pages]``.
    """
    may = (scores > threshold[:, None]) & ~stay  # -inf is above none
    candidates = may.sum(axis=1)
    count = np.clip(room, 0, candidates)
    lowest = np.where(count > 0, -np.inf, np.inf).astype(scores.dtype)
    worth = np.where(may, scores, -np.inf)
    some = (count > 0) & (count < candidates)
    at = scores.shape[1] - count
    for place in np.unique(at[some]).tolist():  # of equal contexts and budgets it is one
        rows = np.flatnonzero(some & (at == place))
        lowest[rows] = np.partition(worth[rows], place, axis=1)[:, place]
    chosen = may & (worth >= lowest[:, None]) & (count > 0)[:, None]
    over = chosen.sum(axis=1) - count
    for row in np.flatnonzero(over).tolist():
        equal = np.flatnonzero(worth[row] == lowest[row])
        chosen[row, equal[: over[row]]] = False
    return chosen
