"""score: asks a request's policy. What it says comes later; that it fails costs a window its prediction, no more."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch

from sglang_lsa.engine.counts import Counts
from sglang_lsa.engine.deferred_scores import Fetch
from sglang_lsa.engine.policies import Policy, Recency
from sglang_lsa.engine.request import Request
from sglang_lsa.memory.scores import Reduction, Scores

logger = logging.getLogger(__name__)

SCORE_LAG = 2
"""Forward passes between the one whose queries are scored and the one before which the scores are read, on a GPU. By
then the overlap scheduler has waited for the first anyway, so that reading them does not."""


class Scorer:
    """The policies of a server.

    Args:
        policies: by name; ``full`` needs none.
        device: on which scores are computed.
        scores: what they pass through before anything is chosen by them.
    """

    def __init__(
        self, policies: Mapping[str, Policy], device: torch.device, counts: Counts, scores: Scores | None = None
    ):
        self.policies, self.device, self.counts = policies, device, counts
        self.scores = scores or Scores()
        self.stands_in = Recency()
        """For a policy that fails."""

    def score(self, request: Request, complete: int) -> Fetch:
        """Queue the scores of the first ``complete`` pages; those of the most recent pages if the policy fails."""
        pages = request.pages[:complete]
        if self.scores.shared:
            return self._shared(request, pages)
        try:
            with Fetch.timed(self.device) as fetch:
                policy = self.policies[request.asked.policy]
                own = self._own(policy, request, pages)
                fetch.scores = policy.finish(self.scores.reduce(own, policy.across_ranks))
            return fetch
        except Exception:
            self._count_failure(request, exception=True)
            fetch = Fetch.of(self.stands_in.score(request, pages))
            fetch.failed = True
            return fetch

    def _own(self, policy: Policy, request: Request, pages: np.ndarray) -> np.ndarray | torch.Tensor:
        own = policy.score(request, pages)
        if len(own) != len(pages):
            raise ValueError(f"{len(own)} scores for {len(pages)} pages")
        return own

    def _shared(self, request: Request, pages: np.ndarray) -> Fetch:
        """The same where several ranks score: a rank comes to them in any case, and a policy that fails on one of them
        has failed on all."""
        name = request.asked.policy
        how = self.policies[name].across_ranks if name in self.policies else Reduction.SAME
        least = 0.0 if how is Reduction.SUM else float("-inf")
        with Fetch.timed(self.device) as fetch:
            packed = torch.zeros(len(pages) + 1, dtype=torch.float32, device=self.device)
            try:
                own = torch.as_tensor(self._own(self.policies[name], request, pages), device=self.device).float()
                packed[:-1] = own if how is Reduction.SUM else own.nan_to_num(nan=least, posinf=None, neginf=least)
            except Exception:
                logger.exception("LSA: scoring %s with %s failed on this rank", request.rid, name)
                packed[:-1], packed[-1] = least, 1.0
            total = self.scores.reduce(packed, how)
            if name in self.policies:
                total[:-1] = torch.as_tensor(self.policies[name].finish(total[:-1]))
            fetch.scores = total

        def instead() -> np.ndarray:
            self._count_failure(request)
            return self.stands_in.score(request, pages)

        fetch.instead, fetch.who = instead, self.scores.who
        return fetch

    def _count_failure(self, request: Request, exception: bool = False) -> None:
        self.counts.fallbacks += 1
        logger.error(
            "LSA: scoring %s with %s failed; its most recent pages stay",
            request.rid,
            request.asked.policy,
            exc_info=exception,
        )
