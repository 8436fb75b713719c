"""score: asks a request's policy. What it says comes later; that it fails costs a window its prediction, no more."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from sglang_lsa.engine.counts import Counts
from sglang_lsa.engine.deferred_scores import Fetch
from sglang_lsa.engine.policies import Policy, Recency
from sglang_lsa.engine.request import Request
from sglang_lsa.memory.scores import Scores

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
        try:
            with Fetch.timed(self.device) as fetch:
                policy = self.policies[request.asked.policy]
                own = policy.score(request, pages)
                if len(own) != len(pages):
                    raise ValueError(f"{len(own)} scores for {len(pages)} pages")
                fetch.scores = self.scores.reduce(own, policy.across_ranks)
            return fetch
        except Exception:
            self.counts.fallbacks += 1
            logger.exception(
                "LSA: scoring %s with %s failed; its most recent pages stay", request.rid, request.asked.policy
            )
            fetch = Fetch.of(self.stands_in.score(request, pages))
            fetch.failed = True
            return fetch
