"""Choose for the group: of pages that are nearly as good, a set has rather those that are read anyway. Pure."""

from __future__ import annotations

import numpy as np


def exchanged(
    positions: np.ndarray,
    scores: np.ndarray,
    stay: np.ndarray,
    common: np.ndarray,
    margin: float,
    threshold: float,
    spare: tuple[float, np.ndarray] | None = None,
) -> np.ndarray:
    """A set of as many pages, of which its group shares as many as nearly equal scores allow.

    Pages that nobody shares go, the worst of them first, and pages that others read and the set has not come in their
    place, the best of them first: as many as leave every page that comes worth at least ``1 - margin`` of every
    one that goes. So pages that score above ``1 / (1 - margin)`` of the best shared page that was left out stay,
    and no more than ``margin`` of what the set was worth is lost. Scores below 0 have no shares, and stay.

    Args:
        positions: the set, ascending.
        scores: ``[complete_pages]``, higher is better; those of pages that come first for another reason are larger
            than all others.
        stay: bool ``[complete_pages or more]``, pages that are in the set whatever their score.
        common: positions that would be read for the whole group if the set had them, ascending (``worth_sharing``).
        margin: in [0, 1).
        threshold: scores of pages that are worth a place are above it.
        spare: how much the set may lose in all, and what each page ``[complete_pages]`` is worth of that; None where
            only the margin counts.

    Returns:
        Positions, ascending, int64: the same number of them.
    """
    shared, has = np.zeros((2, len(scores)), dtype=bool)  # a tenth of the time of numpy's setdiff1d
    shared[common[common < len(scores)]] = has[positions] = True
    comes = np.flatnonzero(shared & ~has & (scores > max(threshold, 0.0)))
    goes = np.flatnonzero(has & ~shared & ~stay[: len(scores)])
    goes = goes[np.argsort(scores[goes], kind="stable")]
    comes = comes[np.argsort(-scores[comes], kind="stable")]
    pairs = min(len(goes), len(comes))
    # The first of ``comes`` is the best, the first of ``goes`` the worst: from the first pair that fails on, all do.
    count = int((scores[comes[:pairs]] >= (1 - margin) * scores[goes[:pairs]]).sum())
    if spare is not None:
        lost = np.cumsum(spare[1][goes[:count]] - spare[1][comes[:count]])
        count = int((np.maximum.accumulate(lost) <= spare[0]).sum())
    has[goes[:count]], has[comes[:count]] = False, True
    return np.flatnonzero(has)
