"""The index of a model that has one of its own: which layers have it, and what is kept of it for absent pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sglang_lsa.config import LSAConfig
from sglang_lsa.indexer.flashmemory import numbers_of
from sglang_lsa.memory.layout.dsv4 import INDEX_ROW

SCORED = (10, 12, 20)
"""Of 21 layers with an index, those whose keys the paper's checkpoint looks at; of fewer, those in the same places."""


@dataclass(frozen=True)
class NativeIndex:
    """Of a model.

    Attributes:
        layers: that have an index, by their number in the model, ascending.
        heads, head_dim: of its queries.
        hidden: numbers of a hidden state, as it enters the index.
        dtype: of hidden states.
    """

    layers: tuple[int, ...]
    heads: int
    head_dim: int
    hidden: int
    dtype: torch.dtype


class IndexObserver(Protocol):
    """Keeps what the index sees of the last tokens of every request, in static buffers that CUDA graphs record.

    Attributes:
        positions: last ones that are kept of a request, at least 1.
        nbytes: on the device.
    """

    @property
    def positions(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def begin(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """A pass computes these tokens: ``[tokens]``, row of each in SGLang's ``req_to_token``, and absolute position.
        While a graph is captured they are its static inputs."""

    def wants_hidden(self, layer: int) -> bool:
        """Whether hidden states that enter the index of this layer are kept; the same for the life of a server."""

    def wants_query(self, layer: int) -> bool:
        """Whether index queries of this layer are kept; the same for the life of a server."""

    def capture_hidden(self, layer: int, x: torch.Tensor) -> None:
        """``[tokens, hidden]`` of the pass."""

    def capture_index_query(self, layer: int, q: torch.Tensor, weights: torch.Tensor) -> None:
        """Queries and weights of their heads, as SGLang's indexer computes them."""


class IndexKeys(Protocol):
    """Index keys of every virtual page, on the device, of some layers.

    Attributes:
        layers: of which they are kept.
        nbytes: on the device.
    """

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def complete(self, virtual: np.ndarray, physical: np.ndarray) -> None:
        """Remember pages that a queued pass has filled, reading them from the device pool."""


def scorer_layers(config: LSAConfig, index: NativeIndex) -> tuple[int, ...]:
    """Layers whose index keys are kept for all virtual pages: those of a checkpoint, the configured ones, or three, at
    the places of :data:`SCORED`; all of three.

    Raises:
        ValueError: a configured layer has no index, the checkpoint cannot be read or has layers that the model lacks,
            or layers are given beside it.
    """
    if config.indexer:
        numbers = numbers_of(config.indexer)
        if config.observe_layers is not None:
            raise ValueError(
                f"--lsa-observe-layers {','.join(map(str, config.observe_layers))}: the checkpoint {config.indexer} "
                "says which layers are observed: leave the flag out"
            )
        if numbers[-1] >= len(index.layers):
            raise ValueError(
                f"--lsa-indexer {config.indexer} is for layer {numbers[-1]} of those with an index, the model has "
                f"{len(index.layers)}: give the checkpoint that was trained for it"
            )
        return tuple(index.layers[number] for number in numbers)
    if config.observe_layers is not None:
        if wrong := [layer for layer in config.observe_layers if layer not in index.layers]:
            raise ValueError(
                f"--lsa-observe-layers names layer {wrong[0]}, which has no index: use some of "
                f"{', '.join(map(str, index.layers))}"
            )
        return tuple(config.observe_layers)
    count = len(index.layers)
    if count <= len(SCORED):
        return index.layers
    return tuple(index.layers[place] for place in sorted({round(scored * (count - 1) / 20) for scored in SCORED}))


def page_bytes(config: LSAConfig, index: NativeIndex) -> int:
    """Device bytes of the index keys that are kept of one virtual page."""
    return len(scorer_layers(config, index)) * INDEX_ROW


def row_bytes(config: LSAConfig, index: NativeIndex) -> int:
    """Device bytes that the observer keeps of one request: index queries with the weights of their heads, and hidden
    states where a checkpoint reads them."""
    position = index.heads * (index.head_dim + 4) + (index.hidden * index.dtype.itemsize if config.indexer else 0)
    return config.query_tokens * len(scorer_layers(config, index)) * position
