"""The indexer as a policy: keeps keys of every page, scores pages by the queries of the recent tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.observe import QueryObserver
from sglang_lsa.engine.policies.base import Parts, Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.indexer.checkpoint import read_checkpoint_config
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.kernels.page_score import to_8_bits
from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.scores import Reduction
from sglang_lsa.memory.transfer import ids_on


class Indexer(Policy):
    """The trained memory indexer.

    Args:
        indexer: on the layout's device.
        observer: of the indexer's layers.
        layout: shows the model's keys.
        virtual_pages: that there can be.
    """

    name = "indexer"
    queries = True
    calibrated = True
    across_ranks = Reduction.SUM
    """A score is a sum over heads, divided by how many there are in all; a rank that has some of them gives its part of
    that. What neighbours and a page's age are worth is added by all to the whole sum (:meth:`finish`)."""

    def __init__(self, indexer: MemoryIndexer, observer: QueryObserver, layout: KVLayout, virtual_pages: int):
        self.indexer, self.observer, self.layout = indexer, observer, layout
        config = indexer.config
        shape = (virtual_pages + 1, len(indexer.k_at), config.sub_keys, config.key_dim)
        self.table = torch.zeros(shape, dtype=torch.uint8, device=layout.device)
        self.threshold, self.expectation = config.threshold, config.expectation

    @classmethod
    def build(cls, parts: Parts) -> Indexer:
        indexer = MemoryIndexer.load(str(parts.config.indexer)).to(parts.layout.device)
        indexer = indexer.of_rank(parts.ranks.rank, parts.ranks.size)
        assert isinstance(parts.observer, QueryObserver)
        return cls(indexer, parts.observer, parts.layout, parts.virtual_pages)

    @classmethod
    def positions(cls, config: LSAConfig) -> int:
        return read_checkpoint_config(str(config.indexer)).positions

    @classmethod
    def page_bytes(cls, config: LSAConfig) -> int:
        return read_checkpoint_config(str(config.indexer)).page_bytes

    @classmethod
    def rank_page_bytes(cls, config: LSAConfig, ranks: int) -> int:
        return read_checkpoint_config(str(config.indexer)).rank_page_bytes(ranks)

    def complete(self, virtual: np.ndarray, physical: np.ndarray) -> None:
        if len(virtual) and self.table.shape[1]:
            p, v = ids_on(self.table.device, np.stack((physical, virtual)))
            keys = self.layout.keys_of(self.indexer.config.layers, p)
            self.table[v] = to_8_bits(self.indexer.page_keys(keys))

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        return self.score_all([request], [pages])

    def score_all(self, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> torch.Tensor:
        asked = self.observer.asked(requests, pages)
        return self.indexer.score_parts(self.observer.buffer, self.table, asked)

    def finish(self, scores: np.ndarray | torch.Tensor) -> torch.Tensor:
        return self.finish_all(scores, [len(scores)])

    def finish_all(self, scores: np.ndarray | torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        assert isinstance(scores, torch.Tensor)
        return self.indexer.finish_all(scores, sizes)

    @property
    def nbytes(self) -> int:
        return self.table.numel() * self.table.element_size()
