"""FlashMemory's retriever (arXiv 2606.09079): what enters the model's index predicts which of its keys are needed."""

from __future__ import annotations

import numpy as np
import torch

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.native_index import NativeIndex
from sglang_lsa.engine.observe_index import IndexRings, KeptIndexKeys
from sglang_lsa.engine.policies.base import Parts, Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.indexer.flashmemory import Retriever as Layer
from sglang_lsa.indexer.flashmemory import load_retrievers, numbers_in
from sglang_lsa.kernels.retriever_score_paged import retriever_score_paged
from sglang_lsa.memory.transfer import ids_on

NEEDED = 0.0
"""Logit above which a key counts as needed: a probability of one half."""


def worth(best: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """Of pages by how many of their keys are needed, and of those with as many by their best key: a part of one that
    orders logits of up to a hundred thousand, where a sigmoid is 0 or 1 from a hundred on.

    Args:
        best, needed: from :func:`retriever_score_paged`.
    """
    best = best.clamp(-1e30, 1e30)
    return needed + 0.5 + 0.5 * best / (1 + best.abs())


class Retriever(Policy):
    """A trained checkpoint. A page is worth the number of its keys that are needed, by the layer and the recent
    position that need most of them.

    Args:
        layers: in the order of the observer's, on its device and in the type of hidden states.
    """

    name = "retriever"
    queries = True
    index = True

    def __init__(self, layers: list[Layer], observer: IndexRings, keys: KeptIndexKeys):
        self.layers, self.observer, self.keys = layers, observer, keys

    @classmethod
    def build(cls, parts: Parts) -> Retriever:
        """Raises ValueError when the checkpoint is for a model of another size, or cannot be read."""
        observer, keys, index = parts.observer, parts.page_keys, parts.index
        assert isinstance(observer, IndexRings) and isinstance(keys, KeptIndexKeys) and index is not None
        layers = list(load_retrievers(str(parts.config.indexer)).values())
        if (width := layers[0].down.shape[1]) != index.hidden:
            raise ValueError(
                f"--lsa-indexer {parts.config.indexer} reads hidden states of {width} numbers, the model has "
                f"{index.hidden}: give the checkpoint that was trained for it"
            )
        device = parts.layout.device
        return cls([layer.to(device, index.dtype) for layer in layers], observer, keys)

    @classmethod
    def fixed_bytes(cls, config: LSAConfig, index: NativeIndex) -> int:
        return numbers_in(str(config.indexer)) * index.dtype.itemsize

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        at = self.observer.recent(request.first_observed, request.tokens)
        hidden = self.observer.hidden(request.row, at)
        ids = ids_on(hidden.device, pages)
        score = torch.zeros(len(pages), device=hidden.device)
        for slot, (layer, table) in enumerate(zip(self.layers, self.keys.tables, strict=True)):
            best, needed = retriever_score_paged(*layer(hidden[:, slot], at), table, ids, NEEDED)
            score = torch.maximum(score, worth(best, needed).amax(dim=0)) if len(at) else score
        return score

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)
