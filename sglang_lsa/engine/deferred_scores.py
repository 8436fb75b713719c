"""Fetch: numbers that the device computes now and the host reads later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sglang_lsa.memory.ranks import TIMEOUT, RanksDisagree

POLL = 1e-4
"""Seconds between two looks at scores that other ranks have a part in."""


def wait_for(event: Any, who: str = "this rank", timeout: float = TIMEOUT) -> None:
    """Wait for what is queued on the device, but no longer than ranks wait for each other.

    Args:
        who: waits, in words.

    Raises:
        RanksDisagree: it has not come.
    """
    began = time.monotonic()
    while not event.query():
        if time.monotonic() - began > timeout:
            raise RanksDisagree(
                f"LSA: {who} waited {timeout:.0f} s for the other ranks to score pages on the device, and not all "
                "came: they have ended, stand still, or decided otherwise"
            )
        time.sleep(POLL)


class Fetch:
    """Scores of one refresh, or of several that began together, on their way from the device; or already here."""

    def __init__(self) -> None:
        self.scores: np.ndarray | torch.Tensor = np.zeros(0)
        self.device_seconds = 0.0
        self.failed = False
        """They are not the policy's, which failed."""
        self.instead: Callable[[], np.ndarray] | None = None
        """Of several ranks: a number beside the scores says whether the policy failed on any; then this counts."""
        self.shared = False
        """Other ranks have a part in them."""
        self.who = "this rank"
        """Which of them waits."""
        self._of: tuple[Fetch, int, int, int] | None = None
        """The one that this is a part of, where its scores begin and end there, and where that number is."""
        self._began: torch.cuda.Event | None = None
        self._ended: torch.cuda.Event | None = None

    @classmethod
    def of(cls, scores: np.ndarray | torch.Tensor) -> Fetch:
        """Scores that are here."""
        fetch = cls()
        fetch.scores = scores
        return fetch

    @classmethod
    @contextmanager
    def timed(cls, device: torch.device) -> Iterator[Fetch]:
        """The body queues the computation and sets ``scores``; their copy to the host is queued behind it."""
        fetch = cls()
        if device.type == "cuda":
            fetch._began, fetch._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            fetch._began.record()
        yield fetch
        if isinstance(fetch.scores, torch.Tensor) and fetch.scores.is_cuda:
            host = torch.empty(fetch.scores.shape, dtype=fetch.scores.dtype, pin_memory=True)
            host.copy_(fetch.scores, non_blocking=True)
            fetch.scores = host
        if fetch._ended is not None:
            fetch._ended.record()

    def parts(self, sizes: Sequence[int]) -> list[Fetch]:
        """Those of each refresh, of so many pages each, if these are of several, one after the other.

        Where they are of several ranks, numbers that say of each whether its policy failed come after all scores.
        """
        found, start, total = [], 0, sum(sizes)
        for index, size in enumerate(sizes):
            part = Fetch()
            part._of = self, start, start + size, total + index
            part.who = self.who
            found.append(part)
            start += size
        return found

    def values(self) -> np.ndarray:
        """The scores, float ``[n]``; waits for them if they are not here yet."""
        if self._of is not None:
            self._take(*self._of)
            self._of = None
        if self._began is not None and self._ended is not None:
            if self.shared:
                wait_for(self._ended, self.who)
            self._ended.synchronize()
            self.device_seconds = self._began.elapsed_time(self._ended) / 1000
            self._began = self._ended = None
        return self.scores.numpy() if isinstance(self.scores, torch.Tensor) else self.scores

    def _take(self, whole: Fetch, start: int, end: int, failed: int) -> None:
        scores = whole.values()
        self.scores = scores[start:end]
        self.device_seconds = whole.device_seconds * (end - start) / max(1, len(scores))
        if self.instead is not None:
            self.failed = bool(scores[failed] > 0)
            if self.failed:
                self.scores = self.instead()
