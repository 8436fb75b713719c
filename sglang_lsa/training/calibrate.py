"""Where to put the threshold, so that selection knows what is worth a page; and what sets cover, so that it knows how
many pages to take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sglang_lsa.indexer.expectation import Expectation, Sample
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.training.data import Recording
from sglang_lsa.training.recall import Rules, predict

CANDIDATES = 200
"""Thresholds that are tried."""


def calibrate(
    recordings: Sequence[Recording], indexer: MemoryIndexer, rules: Rules, target: float, device: str = "cpu"
) -> tuple[float, float]:
    """The largest threshold at which the pages above it get at least ``target`` of the heads' attention.

    Only pages that are not kept in any case count. All recordings weigh the same.

    Returns:
        The threshold, and the coverage there, measured. 0 and 1 where no threshold reaches the target.
    """
    seen: list[tuple[str, np.ndarray, np.ndarray]] = []
    for recording in recordings:
        keys = indexer.keys_of_runs(recording.runs.to(device))
        for anchor in recording.anchors:
            free = recording.free_pages(anchor, 1e-9, rules.min_pages, rules.sink_pages, rules.recent_pages)
            mass = recording.label(anchor).numpy()[free]
            if mass.sum() > 0:
                score = predict(indexer, recording, anchor, keys).cpu().numpy()[free]
                seen.append((recording.entry.name, score, mass))
    if not seen:
        return 0.0, 1.0
    thresholds = np.quantile(np.concatenate([score for _, score, _ in seen]), np.linspace(0, 1, CANDIDATES))
    by_recording: dict[str, list[np.ndarray]] = {}
    for name, score, mass in seen:
        order = np.argsort(score)
        above = mass.sum() - np.concatenate(([0.0], np.cumsum(mass[order])))
        share = above[np.searchsorted(score[order], thresholds, side="right")] / mass.sum()
        by_recording.setdefault(name, []).append(share)
    kept = np.mean([np.mean(shares, axis=0) for shares in by_recording.values()], axis=0)
    good = np.flatnonzero(kept >= target)
    return (float(thresholds[good[-1]]), float(kept[good[-1]])) if len(good) else (0.0, 1.0)


def expect(
    recordings: Sequence[Recording], indexer: MemoryIndexer, rules: Rules, source: str, device: str = "cpu"
) -> Expectation:
    """What sets of this indexer cover, measured on recordings that it was not trained on.

    Args:
        rules: says which first and last pages stay in any case.
        source: what the recordings are, for whoever reads the checkpoint.

    Raises:
        ValueError: no page that may be left out gets any attention.
    """

    def anchors(recording: Recording) -> list[Sample]:
        keys = indexer.keys_of_runs(recording.runs.to(device))
        found = []
        for anchor in recording.anchors:
            free = recording.free_pages(anchor, 1.0, rules.min_pages, rules.sink_pages, rules.recent_pages)
            scores = predict(indexer, recording, anchor, keys).cpu().numpy()
            found.append((scores, recording.label(anchor).numpy(), ~free))
        return found

    return Expectation.measured((anchors(recording) for recording in recordings), source)


def with_expectation(indexer: MemoryIndexer, expectation: Expectation) -> None:
    """Put it into the indexer's configuration."""
    indexer.config = dataclasses.replace(indexer.config, expectation=expectation)


def describe(recordings: Sequence[Recording], split: str) -> str:
    """What these recordings are, in one line."""
    tokens = [recording.facts.tokens for recording in recordings]
    return f"{len(recordings)} recordings of {min(tokens)} to {max(tokens)} tokens, split {split}"


def with_threshold(indexer: MemoryIndexer, threshold: float, coverage: float) -> None:
    """Put them into the indexer's configuration."""
    indexer.config = dataclasses.replace(indexer.config, threshold=threshold, coverage=coverage)
