"""Quest (Tang et al., arXiv 2406.10774), training-free: bounds on what the keys of a page can get of attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_lsa.engine.observe import PageKeys, QueryObserver
from sglang_lsa.engine.policies.base import Parts, Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.kernels.bound_score import bound_scores
from sglang_lsa.memory.scores import Reduction


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
        return self.score_all([request], [pages])

    def score_all(self, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> torch.Tensor:
        asked = self.observer.asked(requests, pages)
        return bound_scores(self.observer.buffer, self.keys.table, asked, self.scale)
