"""Random pages: what any policy must be better than."""

from __future__ import annotations

import numpy as np

from sglang_lsa.engine.policies.base import Policy
from sglang_lsa.engine.request import Request


class Random(Policy):
    """Others in every window; the same for the same prompt."""

    name = "random"

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        return np.random.default_rng((request.asked.seed, request.window + 1)).random(len(pages))
