"""Native, training-free: pages with the keys that the model's own index would choose from."""

from __future__ import annotations

import numpy as np
import torch

from sglang_lsa.engine.observe_index import IndexRings, KeptIndexKeys
from sglang_lsa.engine.policies.base import Parts, Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.kernels.retriever_score_paged import retriever_score_paged
from sglang_lsa.memory.transfer import ids_on


class Native(Policy):
    """Index queries of the recent tokens, asked of the keys of all pages instead of those that are on the device."""

    name = "native"
    queries = True
    index = True

    def __init__(self, observer: IndexRings, keys: KeptIndexKeys):
        self.observer, self.keys = observer, keys

    @classmethod
    def build(cls, parts: Parts) -> Native:
        observer, keys = parts.observer, parts.page_keys
        assert isinstance(observer, IndexRings) and isinstance(keys, KeptIndexKeys)
        return cls(observer, keys)

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        at = self.observer.recent(request.first_observed, request.tokens)
        queries, weights = self.observer.queries(request.row, at)
        ids = ids_on(queries.device, pages)
        best = [
            retriever_score_paged(queries[:, slot], weights[:, slot], table, ids)[0]
            for slot, table in enumerate(self.keys.tables)
        ]
        return shares(torch.cat(best))


def shares(logits: torch.Tensor) -> torch.Tensor:
    """The largest share of any vote that each page gets.

    A vote is what one position asks in one layer. The model takes the keys with the largest logits, so that only their
    order and distance mean something: by what they are multiplied, and where they begin, differs from position to
    position and from layer to layer. Counted in standard deviations over the pages they can be compared; a softmax
    gives a page that stands out nearly all of a vote, and spreads a vote that says nothing. The largest share counts,
    as in Quest: an average would lose the one position that asks for a passage.

    Args:
        logits: ``[votes, pages]``, the best of each page.

    Returns:
        ``[pages]``, positive: a budget is filled, though nothing stands out.
    """
    if not logits.numel():
        return torch.zeros(logits.shape[1], device=logits.device)
    apart = logits - logits.mean(dim=1, keepdim=True)
    spread = apart.square().mean(dim=1, keepdim=True).sqrt()
    return (apart / spread.clamp(min=torch.finfo(torch.float32).tiny)).softmax(dim=1).amax(dim=0)
