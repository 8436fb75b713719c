"""observe: what the model shows while it runs: the recent queries of every request, and the keys of complete pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.request import Request
from sglang_lsa.indexer.checkpoint import read_checkpoint_config
from sglang_lsa.kernels.page_keys import store_key_bounds
from sglang_lsa.kernels.page_score import SPAN, Ragged
from sglang_lsa.kernels.record import record
from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.transfer import ids_on


class QueryObserver:
    """A ring of the last ``positions`` post-RoPE queries of every request, for a few layers.

    The buffer is static, ``[rows, positions, layers, q_heads, head_dim]``; a token at absolute position ``t`` goes to
    slot ``t % positions``, so prefill chunks and decode steps write it the same way. Decode CUDA graphs record it.
    """

    def __init__(self, rows: int, positions: int, layers: Sequence[int], q_heads: int, head_dim: int, dtype, device):
        self.positions = positions
        self.slot_of_layer = {layer: slot for slot, layer in enumerate(layers)}
        shape = (rows, positions, len(layers), q_heads, head_dim)
        self.buffer = torch.zeros(shape, dtype=dtype, device=device)

    def observe(self, layer: int, queries: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """Record the queries of one layer.

        Args:
            layer: decoder layer; ignored when it is not one of the observed.
            queries: ``[tokens, q_heads, head_dim]``.
            rows: ``[tokens]`` request row of each token.
            positions: ``[tokens]`` absolute position; of each row at most the last ``positions`` tokens.
        """
        slot = self.slot_of_layer.get(layer)
        if slot is not None:
            record(queries.flatten(1), rows, positions, self.buffer.flatten(3), slot)

    def asked(self, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> Ragged:
        """What is scored of several requests, brought to the device in one copy.

        Args:
            pages: of each request the virtual ids of its complete pages, int64 ``[n]``.
        """
        spans, start = [], 0
        for request, own in zip(requests, pages, strict=True):
            first = max(request.first_observed, request.tokens - self.positions)
            whole = request.first_observed <= request.tokens - self.positions
            place = 0 if whole else first % self.positions
            spans.append((request.row, place, request.tokens - first, start, len(own)))
            start += len(own)
        known = np.array(spans, dtype=np.int64).reshape(-1, SPAN)
        moved = ids_on(self.buffer.device, np.concatenate((known.ravel(), *pages)))
        return Ragged(torch.from_numpy(known), moved[: known.size].view(known.shape), moved[known.size :])

    @property
    def nbytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()


class PageKeys:
    """Key bounds of every complete page, by virtual page: ``[virtual_pages + 1, layers, 2, kv_heads, head_dim]``.

    Args:
        layers: to look at; without any, nothing is kept.

    Raises:
        ValueError: the layout has no keys to look at.
    """

    def __init__(self, virtual_pages: int, layout: KVLayout, layers: Sequence[int]):
        self.layout, self.layers = layout, tuple(layers)
        if not self.layers:
            self.table = torch.zeros(0, device=layout.device)
            return
        padding = layout.keys(self.layers[0], torch.zeros(1, dtype=torch.int64, device=layout.device))
        if padding is None:
            raise ValueError(f"a {type(layout).__name__} shows no keys: the model's own index must choose pages")
        shape = (virtual_pages + 1, len(layers), 2, *padding.shape[2:])
        self.table = torch.zeros(shape, dtype=padding.dtype, device=layout.device)

    def complete(self, virtual: np.ndarray, physical: np.ndarray) -> None:
        """Remember pages that have just been filled, reading them from the device pool."""
        if not len(virtual) or not self.layers:
            return
        p, v = ids_on(self.table.device, np.stack((physical, virtual)))
        in_place = self.layout.key_buffers
        if in_place:
            pools = [in_place[layer] for layer in self.layers]
        else:
            found = [self.layout.keys(layer, p) for layer in self.layers]
            pools = [keys.flatten(0, 1) for keys in found if keys is not None]
            p = torch.arange(len(virtual), device=p.device)
        store_key_bounds(pools, p, v, self.table, self.layout.page_tokens)

    @property
    def nbytes(self) -> int:
        return self.table.numel() * self.table.element_size()


def recent_tokens(lengths: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The last ``count`` tokens of each request of a batch.

    Args:
        lengths: tokens of each request in the batch, one request after the other.

    Returns:
        Their places in the batch, and the index of their request, both int64.
    """
    ends = np.cumsum(lengths)
    kept = np.minimum(lengths, count)
    owners = np.repeat(np.arange(len(kept)), kept)
    age = np.arange(len(owners)) - np.repeat(np.cumsum(kept) - kept, kept)
    return np.repeat(ends - kept, kept) + age, owners


def default_layers(layer_count: int) -> tuple[int, ...]:
    """Four layers, evenly spread over the deeper three quarters, where retrieval heads are found."""
    return tuple(sorted({layer_count * part // 16 for part in (5, 8, 11, 14)}))


def observed_layers(config: LSAConfig, layer_count: int) -> Sequence[int]:
    """Layers to observe: those that an indexer reads, the configured ones, or :func:`default_layers`.

    Raises:
        ValueError: a configured layer does not exist in this model, or layers are given beside an indexer.
    """
    if config.indexer:
        if config.observe_layers is not None:
            raise ValueError(
                f"--lsa-observe-layers {','.join(map(str, config.observe_layers))}: the indexer {config.indexer} says "
                "which layers are observed: leave the flag out"
            )
        return read_checkpoint_config(config.indexer).layers
    layers = config.observe_layers or default_layers(layer_count)
    wrong = [layer for layer in layers if not 0 <= layer < layer_count]
    if wrong:
        raise ValueError(f"--lsa-observe-layers names layer {wrong[0]}: the model has layers 0 to {layer_count - 1}")
    return layers
