"""score: asks the policies of requests. What they say comes later; one that fails costs a window its prediction."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sglang_lsa.engine.counts import Counts
from sglang_lsa.engine.deferred_scores import Fetch
from sglang_lsa.engine.policies import Policy, Recency
from sglang_lsa.engine.request import Request
from sglang_lsa.memory.scores import Reduction, Scores

logger = logging.getLogger(__name__)

ONE_BY_ONE = "LSA: scoring %d requests at once with %s failed; one by one"

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
        """The same of one request."""
        return self.score_all([request], [complete])[0]

    def score_all(self, requests: Sequence[Request], complete: Sequence[int]) -> list[Fetch]:
        """Queue the scores of the first ``complete`` pages of each; those of its most recent pages if its policy fails.

        Requests that ask the same policy are scored in one call, and their scores are one copy to the host, and one
        exchange between ranks.
        """
        found: dict[int, Fetch] = {}
        asking: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            asking.setdefault(request.asked.policy, []).append(index)
        for name, places in asking.items():
            group = [requests[place] for place in places]
            pages = [request.pages[: complete[place]] for request, place in zip(group, places, strict=True)]
            score = self._shared if self.scores.shared else self._alone
            found.update(zip(places, score(name, group, pages), strict=True))
        return [found[index] for index in range(len(requests))]

    def _alone(self, name: str, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> list[Fetch]:
        try:
            with Fetch.timed(self.device) as fetch:
                policy, sizes = self.policies[name], [len(own) for own in pages]
                own = self._together(policy, requests, pages)
                if own is not None:
                    fetch.scores = _finish(policy, self.scores.reduce(own, policy.across_ranks), sizes)
            if own is not None:
                return fetch.parts(sizes)
        except Exception:
            if len(requests) == 1:
                return [self._stand_in(requests[0], pages[0])]
            logger.warning(ONE_BY_ONE, len(requests), name, exc_info=True)
        return [self._one(request, own) for request, own in zip(requests, pages, strict=True)]

    def _one(self, request: Request, pages: np.ndarray) -> Fetch:
        """The same of a policy that scores one at a time, or of requests of which one cannot be scored."""
        try:
            with Fetch.timed(self.device) as fetch:
                policy = self.policies[request.asked.policy]
                own = self._own(policy, request, pages)
                fetch.scores = policy.finish(self.scores.reduce(own, policy.across_ranks))
            return fetch
        except Exception:
            return self._stand_in(request, pages)

    def _stand_in(self, request: Request, pages: np.ndarray) -> Fetch:
        """Called where its policy has raised."""
        self._count_failure(request, exception=True)
        fetch = Fetch.of(self.stands_in.score(request, pages))
        fetch.failed = True
        return fetch

    def _own(self, policy: Policy, request: Request, pages: np.ndarray) -> np.ndarray | torch.Tensor:
        own = policy.score(request, pages)
        if len(own) != len(pages):
            raise ValueError(f"{len(own)} scores for {len(pages)} pages")
        return own

    def _together(
        self, policy: Policy, requests: Sequence[Request], pages: Sequence[np.ndarray]
    ) -> torch.Tensor | None:
        if not policy.together("score"):
            return None
        own, wanted = policy.score_all(requests, pages), sum(map(len, pages))
        if own is not None and len(own) != wanted:
            raise ValueError(f"{len(own)} scores for {wanted} pages")
        return own

    def _shared(self, name: str, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> list[Fetch]:
        """The same where several ranks score: a rank comes to them in any case, and a policy that fails on one of them
        has failed on all."""
        policy = self.policies.get(name)
        how = Reduction.SAME if policy is None else policy.across_ranks
        sizes = [len(own) for own in pages]
        total = sum(sizes)
        with Fetch.timed(self.device) as fetch:
            packed = torch.zeros(total + len(requests), dtype=torch.float32, device=self.device)
            self._pack(packed, name, requests, pages, how)
            fetch.scores = packed = self.scores.reduce(packed, how)
            if policy is not None:
                packed[:total] = torch.as_tensor(_finish(policy, packed[:total], sizes))
        fetch.shared, fetch.who = True, self.scores.who
        parts = fetch.parts(sizes)
        for part, request, own in zip(parts, requests, pages, strict=True):
            part.instead = functools.partial(self._instead, request, own)
        return parts

    def _pack(
        self,
        packed: torch.Tensor,
        name: str,
        requests: Sequence[Request],
        pages: Sequence[np.ndarray],
        how: Reduction,
    ) -> None:
        """Write the scores of all requests, and after them whether the policy failed for each."""
        total, least = sum(map(len, pages)), 0.0 if how is Reduction.SUM else float("-inf")

        def known(own: np.ndarray | torch.Tensor) -> torch.Tensor:
            found = torch.as_tensor(own, device=self.device).float()
            return found if how is Reduction.SUM else found.nan_to_num(nan=least, posinf=None, neginf=least)

        try:
            together = self._together(self.policies[name], requests, pages)
            if together is not None:
                packed[:total] = known(together)
                return
        except Exception:
            if len(requests) > 1:
                logger.warning(ONE_BY_ONE, len(requests), name, exc_info=True)
        start = 0
        for index, (request, own) in enumerate(zip(requests, pages, strict=True)):
            place = slice(start, start + len(own))
            try:
                packed[place] = known(self._own(self.policies[name], request, own))
            except Exception:
                logger.exception("LSA: scoring %s with %s failed on this rank", request.rid, name)
                packed[place], packed[total + index] = least, 1.0
            start += len(own)

    def _instead(self, request: Request, pages: np.ndarray) -> np.ndarray:
        self._count_failure(request)
        return self.stands_in.score(request, pages)

    def _count_failure(self, request: Request, exception: bool = False) -> None:
        self.counts.fallbacks += 1
        logger.error(
            "LSA: scoring %s with %s failed; its most recent pages stay",
            request.rid,
            request.asked.policy,
            exc_info=exception,
        )


def _finish(policy: Policy, scores: np.ndarray | torch.Tensor, sizes: Sequence[int]) -> np.ndarray | torch.Tensor:
    """Scores of the model, one request after the other."""
    how = type(policy).finish_all if policy.together("finish") else Policy.finish_all
    return how(policy, scores, sizes)
