"""Quest (Tang et al., arXiv 2406.10774), training-free: bounds on what the keys of a page can get of attention."""

from __future__ import annotations

import numpy as np
import torch

from sglang_lsa.engine.observe import PageKeys, QueryObserver
from sglang_lsa.engine.policies.base import Parts, Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.kernels.page_score import bound_score
from sglang_lsa.memory.scores import Reduction
from sglang_lsa.memory.transfer import ids_on


class Quest(Policy):
    """Upper bounds on the attention that the recent queries could pay to any key of a page."""

    name = "quest"
    queries = True
    page_keys = True
    across_ranks = Reduction.MAX

    def __init__(self, observer: QueryObserver, keys: PageKeys, scale: float):
        self.observer, self.keys, self.scale = observer, keys, scale

    @classmethod
    def build(cls, parts: Parts) -> Quest:
        assert isinstance(parts.observer, QueryObserver) and isinstance(parts.page_keys, PageKeys)
        return cls(parts.observer, parts.page_keys, parts.softmax_scale)

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        queries = self.observer.queries(request.row, request.first_observed, request.tokens)
        return bound_score(queries, self.keys.table, ids_on(self.keys.table.device, pages), self.scale)
