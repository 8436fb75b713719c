"""observe: what the model shows while it runs: the recent queries of every request, and the keys of complete pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.kernels.page_keys import key_bounds


class QueryObserver:
    """A ring of the last ``positions`` post-RoPE queries of every request, for a few layers.

    The buffer is static, ``[rows, positions, layers, q_heads, head_dim]``; a token at absolute position ``t`` goes to
    slot ``t % positions``, so prefill chunks and decode steps write it the same way.
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
            rows: int64 ``[tokens]`` request row of each token.
            positions: int64 ``[tokens]`` absolute position; within a row the last ``positions`` tokens must come last.
        """
        slot = self.slot_of_layer.get(layer)
        if slot is not None:
            self.buffer[rows, positions % self.positions, slot] = queries

    def queries(self, row: int, first: int, length: int) -> torch.Tensor:
        """Queries of one request, ``[n, layers, q_heads, head_dim]``, oldest first.

        Args:
            first: first position observed since the request was (re)admitted.
            length: tokens of the request; positions up to ``length - 1`` have been observed.
        """
        wanted = torch.arange(max(first, length - self.positions), length, device=self.buffer.device)
        return self.buffer[row, wanted % self.positions]

    @property
    def nbytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()


class PageKeys:
    """Key bounds of every complete page, by virtual page: ``[virtual_pages + 1, layers, 2, kv_heads, head_dim]``."""

    def __init__(self, virtual_pages: int, keys: Sequence[torch.Tensor], layers: Sequence[int]):
        _, kv_heads, head_dim = keys[0].shape
        self.sources = [keys[layer] for layer in layers]
        shape = (virtual_pages + 1, len(layers), 2, kv_heads, head_dim)
        self.table = torch.zeros(shape, dtype=keys[0].dtype, device=keys[0].device)

    def complete(self, virtual: np.ndarray, physical: np.ndarray) -> None:
        """Remember pages that have just been filled, reading them from the device pool."""
        if not len(virtual):
            return
        v, p = torch.from_numpy(virtual), torch.from_numpy(physical)
        for slot, source in enumerate(self.sources):
            pages = source.view(-1, PAGE_SIZE, *source.shape[1:])[p]
            self.table[v, slot] = key_bounds(pages)

    def of(self, virtual: np.ndarray) -> torch.Tensor:
        """``[n, layers, 2, kv_heads, head_dim]``."""
        return self.table[torch.from_numpy(virtual)]

    @property
    def nbytes(self) -> int:
        return self.table.numel() * self.table.element_size()


def default_layers(layer_count: int) -> tuple[int, ...]:
    """Four layers, evenly spread over the deeper three quarters, where retrieval heads are found."""
    return tuple(sorted({layer_count * part // 16 for part in (5, 8, 11, 14)}))


def observed_layers(config: LSAConfig, layer_count: int) -> Sequence[int]:
    """Layers to observe.

    Raises:
        ValueError: a configured layer does not exist in this model.
    """
    layers = config.observe_layers or default_layers(layer_count)
    wrong = [layer for layer in layers if not 0 <= layer < layer_count]
    if wrong:
        raise ValueError(f"--lsa-observe-layers names layer {wrong[0]}: the model has layers 0 to {layer_count - 1}")
    return layers
