"""What sets of an indexer really cover: a monotone map from its own estimate to measured attention. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float, float]
Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
TOLD = np.linspace(0.0, 1.0, 51)
"""What sets are told to cover, at which a map is measured."""
NO_EXPECTATION = (
    "budget auto needs an indexer that knows what its sets cover, and the config.json of this one has no expectation: "
    "add it with sglang-lsa calibrate, use another --lsa-indexer, or a budget that is a number, such as 0.135"
)


@dataclass(frozen=True)
class Expectation:
    """What was measured of sets that take pages in order of score until these are told to cover a share.

    Attributes:
        points: ``(told, covered, pages)``, ascending: share of all scores that a set has, pages that always stay
            included; the mean share of the heads' attention in the next window that its pages got; and the mean share
            that it took of the pages that may be left out.
        source: on what that was measured.

    Raises:
        ValueError: the points are no such map; the message says what is wrong.
    """

    points: tuple[Point, ...]
    source: str = ""

    def __post_init__(self) -> None:
        points = np.array(self.points, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 3 or len(points) < 2:
            raise ValueError(f"expectation has points of shape {points.shape}: use two or more of three numbers")
        if not (np.isfinite(points).all() and (points >= 0).all() and (points <= 1).all()):
            raise ValueError("expectation has points that are no shares: use numbers from 0 to 1")
        if (np.diff(points[:, 0]) <= 0).any() or (np.diff(points[:, 1:], axis=0) < 0).any():
            raise ValueError("expectation has points that do not ascend: sort them by what is told")
        if points[0, 0] != 0 or points[-1, 0] != 1:
            raise ValueError(f"expectation goes from {points[0, 0]:g} to {points[-1, 0]:g}: begin at 0, end at 1")

    @classmethod
    def measured(cls, samples: Iterable[Sequence[Sample]], source: str = "") -> Expectation:
        """The mean over documents, in each of which all anchors weigh the same.

        Args:
            samples: for each document ``(scores, mass, stay)`` of its anchors, all ``[complete pages]``: what the
                indexer told before a window, what its heads then paid, and which pages always stay.

        Raises:
            ValueError: there is no anchor with attention, or none with pages that may be left out.
        """
        documents = []
        for anchors in samples:
            found = [_curve(*sample) for sample in anchors if not sample[2].all() and sample[1].sum() > 0]
            if found:
                documents.append(np.mean(found, axis=0))
        if not documents:
            raise ValueError(
                "no recording has attention to pages that may be left out: use longer prompts to measure a set's worth"
            )
        covered, pages = np.maximum.accumulate(np.mean(documents, axis=0), axis=1).clip(0, 1).round(5)
        points = zip(TOLD.round(5).tolist(), covered.tolist(), pages.tolist(), strict=True)
        return cls(tuple(points), source)

    def covered(self, told: float) -> float:
        """Share of the attention that a set is expected to get which has the share ``told`` of all scores."""
        return float(np.interp(told, *self._columns(0, 1)))

    def told_for(self, target: float) -> float:
        """The least share of scores at which a set is expected to cover ``target``."""
        told, covered = self._columns(0, 1)
        at = int(np.searchsorted(covered, target))
        if at == 0:
            return 0.0
        if at == len(covered):
            return 1.0
        part = (target - covered[at - 1]) / (covered[at] - covered[at - 1])
        return float(told[at - 1] + part * (told[at] - told[at - 1]))

    def pages_for(self, target: float) -> float:
        """Share of the pages that may be left out which a set takes, on average, to cover ``target``."""
        return float(np.interp(self.told_for(target), *self._columns(0, 2)))

    def _columns(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        points = np.array(self.points)
        return points[:, first], points[:, second]


def _curve(scores: np.ndarray, mass: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """``[2, told]``: share of ``mass``, and of pages that may be left out, in the smallest set told so much."""
    scores = np.maximum(scores, 0.0)
    latest_first = np.flatnonzero(~stay)[::-1]
    best_first = latest_first[np.argsort(-scores[latest_first], kind="stable")]
    worth = scores[stay].sum() + np.concatenate(([0.0], np.cumsum(scores[best_first])))
    paid = mass[stay].sum() + np.concatenate(([0.0], np.cumsum(mass[best_first])))
    if worth[-1] <= 0:  # it told nothing: whatever is asked for takes everything
        return np.ones((2, len(TOLD)))
    taken = np.minimum(np.searchsorted(worth, TOLD * worth[-1] * (1 - 1e-9)), len(best_first))
    return np.stack((paid[taken] / paid[-1], taken / len(best_first)))
