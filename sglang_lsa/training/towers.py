"""The indexer's towers as sentence-transformers modules: a Router sends queries to one and pages to the other."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.base.modules.module import Module
from torch.utils.checkpoint import checkpoint

from sglang_lsa.indexer.model import MemoryIndexer


class QueryModule(Module):
    """``input_features``, per document and anchor ``[positions, layers, q_heads, head_dim]`` -> ``queries``, each
    ``[heads, positions, key_dim]``."""

    def __init__(self, indexer: MemoryIndexer):
        super().__init__()
        self.indexer = indexer

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        device = self.indexer.query.device
        features["queries"] = [
            [self.indexer.ask(recent.to(device)) for recent in anchors] for anchors in features["input_features"]
        ]
        return features

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Nothing: the indexer is saved as a whole, see ``MemoryIndexer.save``."""


class PageModule(Module):
    """``input_features``, per document ``[pages, RUNS, layers, kv_heads, head_dim]`` -> ``keys``, each ``[pages,
    key_heads, sub_keys, key_dim]``."""

    def __init__(self, indexer: MemoryIndexer):
        super().__init__()
        self.indexer = indexer

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        device = self.indexer.key.device
        features["keys"] = [self.indexer.keys_of_runs(runs.to(device)) for runs in features["input_features"]]
        return features

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Nothing, as above."""


def as_sentence_transformer(indexer: MemoryIndexer, device: str) -> SentenceTransformer:
    """A model whose parameters are those of ``indexer``."""
    router = Router.for_query_document([QueryModule(indexer)], [PageModule(indexer)])
    return SentenceTransformer(modules=[router], device=device)


def scores(indexer: MemoryIndexer, queries: dict[str, Any], pages: dict[str, Any], label: torch.Tensor) -> torch.Tensor:
    """What the towers say of every page at every anchor, in the way of ``MemoryIndexer.score``.

    Logits of all keys are large, so they are held for one anchor at a time, and computed again for the gradients.

    Args:
        label: ``[documents, anchors, pages]``, negative where there is no page.

    Returns:
        Of the same shape; 0 where there is no page.
    """
    found = torch.zeros_like(label)
    for document, (anchors, keys) in enumerate(zip(queries["queries"], pages["keys"], strict=True)):
        for anchor, asked in enumerate(anchors):
            known = int((label[document, anchor] >= 0).sum())
            found[document, anchor, :known] = checkpoint(indexer.score_all, asked, keys[:known], use_reentrant=False)
    return found
