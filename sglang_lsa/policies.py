"""score: policies give every complete page of a request a number, higher meaning needed sooner."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sglang_lsa.kernels.page_score import bound_score
from sglang_lsa.observe import PageKeys, QueryObserver
from sglang_lsa.pages import pages_spanned

HISTORY_WINDOWS = 32
"""Windows whose resident positions are remembered per request."""


@dataclass
class Request:
    """A request as the lookahead sees it, from its first prefill chunk until its KV is released."""

    rid: str
    row: int
    """Its row in SGLang's ``req_to_token`` and in the static tables."""
    seed: int
    """A number made of its prompt: equal prompts get equal random pages and equal window phases."""
    policy: str
    budget: float
    dense: bool
    tokens: int = 0
    first_observed: int = 0
    window: int = -1
    steps_left: int = 0
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tail_start: int = 0
    history: deque[list[int]] = field(default_factory=lambda: deque(maxlen=HISTORY_WINDOWS))
    stalls: int = 0

    def residency(self) -> tuple[int, int]:
        """Pages of the request, and how many of them its decode steps read."""
        context = pages_spanned(self.tokens)
        return context, len(self.positions) + context - self.tail_start


class Policy(Protocol):
    """Scores the complete pages of a request."""

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        """``pages``: virtual ids of the complete pages, int64 ``[n]``. Returns float ``[n]``."""
        ...


class Recency:
    """The most recent pages (with the sink pages: StreamingLLM's window)."""

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        return np.arange(1, len(pages) + 1) / max(1, len(pages))


class Random:
    """Random pages, others in every window; the same for the same prompt."""

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        return np.random.default_rng((request.seed, request.window + 1)).random(len(pages))


class Quest:
    """Training-free: upper bounds on the attention that the recent queries could pay to any key of a page."""

    def __init__(self, observer: QueryObserver, keys: PageKeys, scale: float):
        self.observer, self.keys, self.scale = observer, keys, scale

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        queries = self.observer.queries(request.row, request.first_observed, request.tokens)
        return bound_score(queries, self.keys.of(pages), self.scale).cpu().numpy()
