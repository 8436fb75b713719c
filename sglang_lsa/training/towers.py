"""The indexer's towers as sentence-transformers modules: a Router sends queries to one and pages to the other."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.base.modules.module import Module

from sglang_lsa.indexer.model import MemoryIndexer


class QueryModule(Module):
    """``input_features [batch, positions, layers, hidden]`` -> ``queries [batch, layers, positions, heads, head_dim]``
    and ``weights [batch, layers, positions, heads]``."""

    def __init__(self, indexer: MemoryIndexer):
        super().__init__()
        self.towers, self.bias = indexer.query, indexer.bias

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        seen = [tower(features["input_features"][:, :, i]) for i, tower in enumerate(self.towers)]
        features["queries"], features["weights"] = (torch.stack(part, dim=1) for part in zip(*seen, strict=True))
        features["bias"] = self.bias
        return features

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Nothing: the indexer is saved as a whole, see ``MemoryIndexer.save``."""


class PageModule(Module):
    """``input_features [batch, pages, layers, RUNS, hidden]`` -> ``keys [batch, pages, layers, sub_keys, dim]``."""

    def __init__(self, indexer: MemoryIndexer):
        super().__init__()
        self.towers = indexer.key

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        runs = features["input_features"]
        features["keys"] = torch.stack([tower(runs[:, :, i]) for i, tower in enumerate(self.towers)], dim=2)
        return features

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Nothing, as above."""


def as_sentence_transformer(indexer: MemoryIndexer, device: str) -> SentenceTransformer:
    """A model whose parameters are those of ``indexer``."""
    router = Router.for_query_document([QueryModule(indexer)], [PageModule(indexer)])
    return SentenceTransformer(modules=[router], device=device)


def logits(queries: dict[str, Any], pages: dict[str, Any]) -> torch.Tensor:
    """What the towers say of every page, in the way of ``MemoryIndexer.score``: ``[batch, pages]``."""
    products = torch.einsum("blthd,bplsd->blptsh", queries["queries"], pages["keys"]).relu()
    votes = torch.einsum("blptsh,blth->blpts", products, queries["weights"])
    return (votes.amax(dim=(3, 4)) + queries["bias"][None, :, None]).amax(dim=1)
