"""select: which pages of a request stay on the device for the next window. Pure; knows neither SGLang nor a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Watched:
    """What pages that a request asked about were worth when a set was chosen.

    Attributes:
        pages: page, its score (None for one that is no number), and how many pages that may be left out scored higher.
        lowest: score of the last page of the set that is there for its score; None if there is none.
    """

    pages: tuple[tuple[int, float | None, int], ...]
    lowest: float | None


def budget_pages(context_pages: int, budget: float, min_pages: int) -> int:
    """Upper bound of a resident set, in pages, the growing last page included."""
    return min(context_pages, max(min_pages, int(context_pages * budget)))


def always_kept(
    context_pages: int, bound: int, sink_pages: int, recent_pages: int, prompt: int = 0, prompt_pages: int = 0
) -> np.ndarray:
    """Which pages stay whatever their score, as many as a set of ``bound`` pages has room for.

    Sink and recent ones, and the prompt's last ones, where the question is.

    Args:
        prompt: pages of the prompt.
        prompt_pages: last ones of them that stay; at most a quarter of the set.

    Returns:
        bool ``[context_pages]``.
    """
    recent = max(1, min(recent_pages, bound // 4))
    sink = min(sink_pages, bound // 2)
    keep = np.zeros(context_pages, dtype=bool)
    keep[:sink] = True
    keep[context_pages - recent :] = True
    keep[max(0, prompt - min(prompt_pages, bound // 4)) : prompt] = True
    return keep


def affordable(ranks: np.ndarray, costs: np.ndarray, room: int) -> np.ndarray:
    """The best pages that together cost no more than ``room``.

    Args:
        ranks: ``[n]``, higher is better; infinite for pages that must stay.
        costs: bool ``[n]``, whether each takes a device page from those that can be had.

    Returns:
        Indices into ``ranks``, best first, int64. One that is too dear is passed over, not the end.
    """
    best_first = np.argsort(-ranks, kind="stable")
    spent = np.cumsum(costs[best_first])
    return best_first[~costs[best_first] | (spent <= room)]


def select(
    scores: np.ndarray,
    context_pages: int,
    *,
    budget: float,
    min_pages: int,
    sink_pages: int,
    recent_pages: int,
    prompt: int = 0,
    prompt_pages: int = 0,
    threshold: float = float("-inf"),
) -> np.ndarray:
    """Choose the resident set.

    Sink and recent pages and the prompt's last ones always stay; the rest of the budget goes to the best scores above
    ``threshold``, ties to the more recent page. The last, partly filled page belongs to every set and counts as a
    recent one.

    Args:
        scores: ``[complete_pages]``, higher is better. NaN and -inf are not worth keeping.
        context_pages: pages of the request, a partly filled last one included: ``complete_pages`` or one more.
        budget: fraction of ``context_pages`` in (0, 1].
        min_pages: the bound is never below this many pages.
        sink_pages: first pages that always stay; at most half of the set.
        recent_pages: last pages that always stay; at most a quarter of the set, but always one.
        prompt, prompt_pages: as in :func:`always_kept`.

    Returns:
        Sorted positions in ``[0, complete_pages)``, int64.

    Raises:
        ValueError: ``context_pages`` is neither the number of scores nor one more.
    """
    complete = len(scores)
    if context_pages - complete not in (0, 1):
        raise ValueError(f"{complete} scores for {context_pages} pages: score every complete page, and only those")
    bound = budget_pages(context_pages, budget, min_pages)
    if bound >= context_pages:
        return np.arange(complete, dtype=np.int64)
    keep = always_kept(context_pages, bound, sink_pages, recent_pages, prompt, prompt_pages)
    return filled(scores, keep, bound, threshold)


def filled(scores: np.ndarray, stay: np.ndarray, size: int, threshold: float = float("-inf")) -> np.ndarray:
    """A set of ``size`` pages: those that stay, and the best of the others above ``threshold``.

    Args:
        scores: as for :func:`select`.
        stay: bool ``[context_pages]``, see :func:`always_kept`.

    Returns:
        Sorted positions in ``[0, complete_pages)``, int64.
    """
    keep, complete = stay.copy(), len(scores)
    usable = np.array(scores, dtype=np.float64)
    usable[np.isnan(usable)] = -np.inf
    candidates = np.flatnonzero((usable > threshold) & ~keep[:complete])  # -inf is above none
    keep[_best(candidates, usable[candidates], max(0, size - int(keep.sum())))] = True
    return np.flatnonzero(keep[:complete])


def _best(pages: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """``count`` of ``pages``, ascending, with the highest scores, of equal ones the last; in no particular order."""
    if count >= len(pages):
        return pages
    if count <= 0:
        return pages[:0]
    lowest = np.partition(scores, len(pages) - count)[len(pages) - count]  # which one is all that must be known
    higher, equal = pages[scores > lowest], pages[scores == lowest]
    return np.concatenate((higher, equal[len(equal) - (count - len(higher)) :]))


def watched(pages: Sequence[int], scores: np.ndarray, positions: np.ndarray, stays: np.ndarray) -> Watched:
    """The standing of some pages when a set was chosen.

    Args:
        pages: that somebody asks about; those that are not complete yet are left out.
        scores: ``[complete_pages]`` without NaN.
        positions: the set, see :func:`select`.
        stays: bool ``[len(positions)]``, those that are in the set whatever their score.
    """
    rivals = np.delete(scores, positions[stays])
    found = []
    for page in pages:
        if page < len(scores):
            score = float(scores[page])
            found.append((page, score if np.isfinite(score) else None, int((rivals > score).sum())))
    chosen = scores[positions[~stays]]
    return Watched(tuple(found), float(chosen.min()) if len(chosen) and np.isfinite(chosen.min()) else None)


def expected_coverage(shares: np.ndarray, positions: np.ndarray, stay: np.ndarray) -> float:
    """How much of the attention to pages that may be left out goes to those that are not left out.

    Args:
        shares: ``[complete_pages]`` attention that is expected for each page; NaN and -inf count as none.
        positions: the resident set, see :func:`select`.
        stay: bool ``[complete_pages or more]``, pages that are kept whatever their score.

    Returns:
        In [0, 1]; 1 when no page may be left out, 0 when nothing is expected of any.
    """
    free = ~stay[: len(shares)]
    if not free.any():
        return 1.0
    worth = np.where(free & np.isfinite(shares), shares, 0.0)
    return float(worth[positions].sum() / total) if (total := worth.sum()) > 0 else 0.0


def free_shares(shares: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """What each page has of the attention to pages that may be left out, float ``[complete_pages]``: those of a set add
    up to :func:`expected_coverage`."""
    worth = np.where(~stay[: len(shares)] & np.isfinite(shares), shares, 0.0)
    return worth / total if (total := worth.sum()) > 0 else np.zeros(len(shares))


def told_coverage(shares: np.ndarray, positions: np.ndarray) -> float:
    """What a set has of all scores, pages that always stay included: in [0, 1], 0 when nothing is expected of any.

    Args: as for :func:`expected_coverage`.
    """
    worth = np.where(np.isfinite(shares), np.maximum(shares, 0.0), 0.0)
    return float(worth[positions].sum() / total) if (total := worth.sum()) > 0 else 0.0


def told_shares(shares: np.ndarray) -> np.ndarray:
    """What each page has of all scores, float ``[complete_pages]``: those of a set add up to :func:`told_coverage`."""
    worth = np.where(np.isfinite(shares), np.maximum(shares, 0.0), 0.0)
    return worth / total if (total := worth.sum()) > 0 else worth


def needed_pages(shares: np.ndarray, stay: np.ndarray, least: int, most: int, told: float) -> int:
    """Pages of the smallest set that has so much of all scores, see :func:`told_coverage`.

    Args:
        shares, stay: as for :func:`expected_coverage`.
        least, most: in pages, the growing last page included.
        told: share of all scores.

    Returns:
        ``most`` when nothing is expected of any page.
    """
    worth = np.where(np.isfinite(shares), np.maximum(shares, 0.0), 0.0)
    stays = stay[: len(shares)]
    best = np.sort(worth[~stays])[::-1]
    if (total := worth.sum()) <= 0:
        return most
    scored = int(np.searchsorted(worth[stays].sum() + np.cumsum(best), told * total * (1 - 1e-9))) + 1
    return int(np.clip(int(stay.sum()) + min(scored, len(best)), min(least, most), most))


def widened(shares: np.ndarray, stay: np.ndarray, bound: int, most: int, coverage: float) -> int:
    """Pages of the smallest set that is expected to cover enough: at least ``bound``, at most ``most``.

    Args:
        shares, stay: as in :func:`expected_coverage`.
        bound, most: in pages, the growing last page included.
        coverage: that is enough.
    """
    free = ~stay[: len(shares)]
    worth = np.sort(np.where(np.isfinite(shares), shares, 0.0)[free])[::-1]
    if not len(worth) or worth.sum() <= 0:
        return most
    enough = int(np.searchsorted(np.cumsum(worth), coverage * worth.sum() * (1 - 1e-9))) + 1
    return int(np.clip(int(stay.sum()) + enough, bound, max(bound, most)))
