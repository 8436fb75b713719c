"""The most recent pages (with the sink pages: StreamingLLM's window)."""

from __future__ import annotations

import numpy as np

from sglang_lsa.engine.policies.base import Policy
from sglang_lsa.engine.request import Request


class Recency(Policy):
    """The later a page, the higher."""

    name = "recency"

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        return np.arange(1, len(pages) + 1) / max(1, len(pages))
