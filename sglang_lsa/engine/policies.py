"""score: policies give every complete page of a request a number, higher meaning needed sooner."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from sglang_lsa.engine.observe import PageKeys, QueryObserver
from sglang_lsa.engine.request import Request
from sglang_lsa.kernels.page_score import bound_score
from sglang_lsa.memory.transfer import ids_on


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
        return np.random.default_rng((request.asked.seed, request.window + 1)).random(len(pages))


class Quest:
    """Training-free: upper bounds on the attention that the recent queries could pay to any key of a page."""

    def __init__(self, observer: QueryObserver, keys: PageKeys, scale: float):
        self.observer, self.keys, self.scale = observer, keys, scale

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        queries = self.observer.queries(request.row, request.first_observed, request.tokens)
        return bound_score(queries, self.keys.table, ids_on(self.keys.table.device, pages), self.scale)
