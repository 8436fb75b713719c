"""Requests of ``bench load`` as tests send and time them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_lsa.bench.load_client import Load, Sent
from sglang_lsa.bench.load_figures import Objective
from sglang_lsa.bench.load_mix import MIXES, Request
from sglang_lsa.streaming import Stream

AGENTS, DOCUMENTS = MIXES["agents"], MIXES["documents"]
OBJECTIVE = Objective(5.0, 30.0)


def sent(at: float, times: list[float], answer: int = 0, **more: Any) -> Sent:
    """A token came at each of the times; it is done when those are as many as it asked for (by default they are)."""
    tokens = list(range(1, len(times) + 1))
    answer = answer or len(times)
    stream = Stream(at, times, tokens, done=len(times) == answer, usage={"prompt_tokens": 10, "cached_tokens": 5})
    return Sent(Request(at, None, np.array([1]), answer), stream, **more)


RUN = Load(
    10.0,
    [
        sent(0.0, [1.0, 1.02, 1.04]),
        sent(1.0, [7.0, 7.02], lag=0.25),  # its first token is late
        sent(9.0, [9.5, 10.5, 11.0]),  # done after the last arrival, and slow
        sent(9.5, [9.75, 9.77, 9.79], answer=50),  # not done when the run ended
        sent(4.0, [], answer=9),  # still waits
        sent(5.0, [], answer=9, refused="HTTP 400: too long"),
    ],
    end=12.0,
    running=[1, 2, 6],
    waiting=[0, 0, 4],
)
