"""The indexer as a policy: observes hidden states, keeps page keys, scores pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.kernels.record import record
from sglang_lsa.observe import recent_tokens
from sglang_lsa.policies import Request
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.radix_ext.transfer import ids_on


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers of an SGLang model.

    Raises:
        ValueError: it has no ``model.layers`` list.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise ValueError(f"{type(model).__name__} has no model.layers: an indexer cannot observe it; use quest")
    return layers


class HiddenObserver:
    """Hidden states of a few decoder layers: the whole last prefill chunk, and a ring of recent tokens per request.

    The ring is ``[rows, positions, layers, hidden]``, at least one page long, so that a page that fills up during
    decode can be read back from it. Decode CUDA graphs record it.
    """

    def __init__(self, rows: int, positions: int, layers: tuple[int, ...], hidden: int, dtype, device):
        self.layers = layers
        self.positions = max(positions, PAGE_SIZE)
        self.wanted = positions
        self.ring = torch.zeros((rows, self.positions, len(layers), hidden), dtype=dtype, device=device)

    def watch(self, model: nn.Module) -> None:
        """Hook the decoder layers of an SGLang model, which return ``(hidden, residual)``.

        Raises:
            ValueError: the model has no ``model.layers`` list.
        """
        layers = decoder_layers(model)
        for slot, layer in enumerate(self.layers):
            layers[layer].register_forward_hook(self._hook(slot))

    def _hook(self, slot: int):
        def keep(module, inputs, output):
            positions, _, batch = inputs[0], inputs[1], inputs[2]
            hidden = output[0] + output[1]
            if batch.extend_seq_lens_cpu is None:  # decode: one token a request; no host work, so that graphs record it
                record(hidden, batch.req_pool_indices, positions, self.ring, slot)
                return
            tokens, owners = recent_tokens(list(batch.extend_seq_lens_cpu), self.positions)
            recent, owner = (ids_on(hidden.device, ids) for ids in (tokens, owners))
            record(hidden[recent], batch.req_pool_indices[owner], positions[recent], self.ring, slot)
            if slot == 0:
                self.chunk = hidden.new_empty((len(hidden), len(self.layers), hidden.shape[1]))
            self.chunk[:, slot] = hidden

        return keep

    def recent(self, request: Request) -> torch.Tensor:
        """``[positions, layers, hidden]``, oldest first."""
        first = max(request.first_observed, request.tokens - self.wanted)
        return self.ring[request.row, torch.arange(first, request.tokens, device=self.ring.device) % self.positions]

    def pages(self, request: Request, first: int, count: int, chunk_start: int | None, prefix: int) -> torch.Tensor:
        """Hidden states of complete pages, ``[count, page, layers, hidden]``.

        Args:
            first: position of the first page in the request.
            chunk_start: where the request's tokens start in the last prefill chunk; None after a decode step.
            prefix: tokens of the request before that chunk.
        """
        start, stop = first * PAGE_SIZE, (first + count) * PAGE_SIZE
        if chunk_start is None:
            found = self.ring[request.row, torch.arange(start, stop, device=self.ring.device) % self.positions]
        else:
            found = self.chunk[chunk_start + start - prefix : chunk_start + stop - prefix]
        return found.view(count, PAGE_SIZE, *found.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.ring.numel() * self.ring.element_size()


class Indexer:
    """Policy: the trained memory indexer."""

    def __init__(self, indexer: MemoryIndexer, observer: HiddenObserver, virtual_pages: int):
        self.indexer, self.observer = indexer, observer
        config = indexer.config
        shape = (virtual_pages + 1, len(config.layers), config.sub_keys, config.head_dim)
        self.keys = torch.zeros(shape, dtype=torch.bfloat16, device=observer.ring.device)

    def complete(self, request: Request, pages: np.ndarray, first: int, chunk_start: int | None, prefix: int) -> None:
        """Remember the keys of pages that have just been filled; arguments as in ``HiddenObserver.pages``."""
        if len(pages):
            hidden = self.observer.pages(request, first, len(pages), chunk_start, prefix)
            self.keys[ids_on(self.keys.device, pages)] = self.indexer.page_keys(hidden).to(self.keys.dtype)

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        return self.indexer.score(self.observer.recent(request), self.keys[ids_on(self.keys.device, pages)])

    @property
    def nbytes(self) -> int:
        return self.keys.numel() * self.keys.element_size()


def load_indexer(config: LSAConfig, pager: Pager, rows: int, model: torch.nn.Module) -> Indexer:
    """Load ``config.indexer`` and let it observe ``model``.

    Raises:
        ValueError: the checkpoint is broken, or the model's layers cannot be found.
    """
    keys = pager.keys[0]
    towers = MemoryIndexer.load(str(config.indexer)).to(keys.device)
    shape = towers.config
    observer = HiddenObserver(rows, config.query_tokens, shape.layers, shape.hidden_size, keys.dtype, keys.device)
    observer.watch(model)
    return Indexer(towers, observer, pager.ledger.virtual_pages)
