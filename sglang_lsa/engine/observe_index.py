"""observe, for a model with an index of its own: what the index is asked, and its keys of complete pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sglang_lsa.engine.native_index import NativeIndex
from sglang_lsa.kernels.record import record
from sglang_lsa.kernels.retriever_score_paged import ROW
from sglang_lsa.memory.transfer import ids_on


class IndexRings:
    """Rings of what enters the model's own index with the last ``positions`` tokens of every request, for a few layers.

    A token at absolute position ``t`` goes to slot ``t % positions``, as in :class:`QueryObserver`. The buffers are
    static, and decode CUDA graphs record them.

    Args:
        rows: of SGLang's ``req_to_token``; row 0 is padding.
        hidden: whether hidden states are kept, ``[rows, positions, layers, index.hidden]``.
        queries: whether index queries are, fp8 ``[rows, positions, layers, heads * head_dim]``, and the weights of
            their heads, float32 ``[rows, positions, layers, heads]``.
    """

    def __init__(
        self, rows: int, positions: int, layers: Sequence[int], index: NativeIndex, hidden: bool, queries: bool, device
    ):
        self.positions, self.index = positions, index
        self.slot_of_layer = {layer: slot for slot, layer in enumerate(layers)}
        shape = (rows, positions, len(layers))

        def ring(kept: bool, width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((*shape, width) if kept else (0, *shape[1:], width), dtype=dtype, device=device)

        self._hidden = ring(hidden, index.hidden, index.dtype)
        self._queries = ring(queries, index.heads * index.head_dim, torch.uint8)
        self._weights = ring(queries, index.heads, torch.float32)
        self._rows = self._positions = torch.zeros(0, dtype=torch.int64, device=device)

    def begin(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """A pass computes these tokens, those of a request one after the other.

        Args:
            rows: ``[tokens]`` row of each; while a graph is captured its static input, like the next.
            positions: ``[tokens]`` absolute position of each.
        """
        self._rows, self._positions = rows, positions

    def wants_hidden(self, layer: int) -> bool:
        """Whether hidden states of this layer are kept."""
        return len(self._hidden) > 0 and layer in self.slot_of_layer

    def wants_query(self, layer: int) -> bool:
        """Whether index queries of this layer are kept."""
        return len(self._queries) > 0 and layer in self.slot_of_layer

    def capture_hidden(self, layer: int, x: torch.Tensor) -> None:
        """Record ``[tokens, hidden]``, what enters the index of a layer; nothing where it is not wanted."""
        if self.wants_hidden(layer):
            self._record(self._hidden, layer, x)

    def capture_index_query(self, layer: int, q: torch.Tensor, weights: torch.Tensor) -> None:
        """Record what the index of a layer is asked; nothing where it is not wanted.

        Args:
            q: fp8 (e4m3) ``[tokens, heads, head_dim]``, rotated and transformed.
            weights: float32 ``[tokens, heads, 1]`` or ``[tokens, heads]``, the scales of ``q`` in them.

        Raises:
            ValueError: queries are of another type.
        """
        if not self.wants_query(layer):
            return
        if q.dtype != torch.float8_e4m3fn:
            raise ValueError(f"index queries are {q.dtype}: only those in float8_e4m3fn are kept")
        words = self._queries.view(torch.int32)
        self._record(words, layer, q.contiguous().view(torch.uint8).flatten(1).view(torch.int32))
        self._record(self._weights, layer, weights.flatten(1))

    def _record(self, ring: torch.Tensor, layer: int, source: torch.Tensor) -> None:
        tokens = min(len(source), len(self._rows), len(self._positions))
        slot = self.slot_of_layer[layer]
        record(source[:tokens], self._rows[:tokens], self._positions[:tokens], ring, slot, last=True)

    def recent(self, first: int, length: int) -> torch.Tensor:
        """Positions that are kept of a request, int64 ``[n]`` on the device, ascending.

        Args:
            first: first position observed since the request was (re)admitted.
            length: tokens of the request; positions up to ``length - 1`` have been observed.
        """
        return torch.arange(max(first, length - self.positions), length, device=self._weights.device)

    def hidden(self, row: int, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states of one request at ``positions`` of :meth:`recent`, ``[n, layers, hidden]``."""
        return self._hidden[row, positions % self.positions]

    def queries(self, row: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries of one request at ``positions`` of :meth:`recent`, uint8 that are fp8 (e4m3)
        ``[n, layers, heads, head_dim]``, and weights, float32 ``[n, layers, heads]``."""
        place = positions % self.positions
        queries = self._queries[row, place].unflatten(-1, (self.index.heads, self.index.head_dim))
        return queries, self._weights[row, place]

    @property
    def nbytes(self) -> int:
        return sum(ring.numel() * ring.element_size() for ring in (self._hidden, self._queries, self._weights))


class KeptIndexKeys:
    """Index keys of every complete page, by virtual page, whether or not the page is on the device.

    Args:
        virtual_pages: that there can be.
        buffers: by layer, uint8 ``[physical_pages + 1, 8448]`` of the device pool.
        layers: of which keys are kept.

    Attributes:
        tables: of each layer uint8 ``[virtual_pages + 1, 8448]``, for ``kernels.retriever_score_paged``.

    Raises:
        ValueError: a page of the pool has another size.
    """

    def __init__(self, virtual_pages: int, buffers: Mapping[int, torch.Tensor], layers: Sequence[int]):
        self.layers = tuple(layers)
        self.buffers = [buffers[layer] for layer in self.layers]
        for layer, buffer in zip(self.layers, self.buffers, strict=True):
            if buffer.dtype != torch.uint8 or buffer.shape[1:] != (ROW,):
                raise ValueError(
                    f"index keys of layer {layer} are {buffer.dtype} {tuple(buffer.shape)}: only pages of {ROW} bytes, "
                    "64 keys of 128 numbers in fp8 and their scales, can be scored"
                )
        self.tables = [
            torch.zeros((virtual_pages + 1, ROW), dtype=torch.uint8, device=buffer.device) for buffer in self.buffers
        ]

    def complete(self, virtual: np.ndarray, physical: np.ndarray) -> None:
        """Remember pages that a queued pass has filled, reading them from the device pool on the current stream."""
        if not len(virtual) or not self.layers:
            return
        p, v = ids_on(self.tables[0].device, np.stack((physical, virtual)))
        for buffer, table in zip(self.buffers, self.tables, strict=True):
            table.view(torch.int64)[v] = buffer.view(torch.int64)[p]

    @property
    def nbytes(self) -> int:
        return sum(table.numel() for table in self.tables)
