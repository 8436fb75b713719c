"""What a benchmark counts: the time during which as many requests as ever decode at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_lsa.streaming import Stream


@dataclass(frozen=True)
class Plateau:
    """Decode figures of the requests that ran at the same time, after the last of them was prefilled."""

    running: int
    seconds: float
    tokens: int
    itl_ms: np.ndarray
    """Milliseconds per token of every chunk."""
    ttft_s: float
    """Median over these requests."""
    ttft_last_s: float
    """Of the one that waited longest. Prompts that come together are computed some at a time, and which of these the
    middle one is among is chance."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.itl_ms, q))


def plateau(streams: Sequence[Stream], skip_tokens: int = 0) -> Plateau:
    """Find it: from the first token of the last request that got one, to the end of the first that finished.

    Args:
        skip_tokens: tokens of that last request to leave out as warm-up.

    Raises:
        ValueError: nothing finished, or nothing is left to measure.
    """
    started = [stream for stream in streams if stream.times]
    finished = [stream.times[-1] for stream in started if stream.done]
    if not finished:
        raise ValueError("no request finished")
    end = min(finished)
    running = [stream for stream in started if stream.times[0] < end]
    last = max(running, key=lambda stream: stream.times[0])
    begin = next((t for t, n in zip(last.times, last.tokens, strict=True) if n > skip_tokens), end)
    total, pace = 0, []
    for stream in running:
        times, tokens = np.array(stream.times), np.array(stream.tokens)
        inside = (times >= begin) & (times <= end)
        if inside.sum() > 1:
            t, n = times[inside], tokens[inside]
            total += int(n[-1] - n[0])
            pace.append(np.diff(t) / np.maximum(1, np.diff(n)) * 1000)
    if not total:
        raise ValueError("the requests did not overlap: ask for more tokens")
    ttft = np.array([stream.times[0] - stream.sent for stream in running])
    paces = np.concatenate(pace)
    return Plateau(len(running), end - begin, total, paces, float(np.median(ttft)), float(ttft.max()))
