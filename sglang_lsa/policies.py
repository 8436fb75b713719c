"""score: policies give every complete page of a request a number, higher meaning needed sooner."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from sglang_lsa.fetch import Fetch
from sglang_lsa.kernels.page_score import bound_score
from sglang_lsa.observe import PageKeys, QueryObserver
from sglang_lsa.pages import pages_spanned
from sglang_lsa.radix_ext.transfer import ids_on

HISTORY_WINDOWS = 32
"""Windows whose resident positions are remembered per request."""


@dataclass
class Refresh:
    """A resident set on its way: first its scores, then its positions, then its pages."""

    complete: int
    """Complete pages of the request when it was predicted; later ones belong to the tail."""
    context: int
    """Pages of the request then, a partly filled last one included."""
    due: int
    """Number of the step before which its scores are read."""
    scores: Fetch | None
    """None for a dense request."""
    positions: np.ndarray | None = None
    tail_start: int = 0
    late: bool = False
    """Its window has begun without it."""

    def needed(self, pages: np.ndarray) -> np.ndarray:
        """Those of the request's ``pages`` that decode would read."""
        assert self.positions is not None
        return np.concatenate((pages[self.positions], pages[self.tail_start :]))


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
    pages: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Virtual ids of its pages, int64 ``[pages_spanned(tokens)]``."""
    next: Refresh | None = None
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

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray | torch.Tensor:
        """``pages``: virtual ids of the complete pages, int64 ``[n]``. Returns float ``[n]``, on the host or, queued
        behind the forward pass, on the device."""
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

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        queries = self.observer.queries(request.row, request.first_observed, request.tokens)
        return bound_score(queries, self.keys.table, ids_on(self.keys.table.device, pages), self.scale)
