"""KVLayout: the bytes of a page as pieces, and who may look inside. All else of ``memory/`` moves and counts bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch


@dataclass(frozen=True)
class Piece:
    """One buffer of the device pool, as bytes.

    Attributes:
        buffer: uint8 ``[physical_pages + 1, bytes]``, a view of SGLang's memory.
        offset: of its bytes in a host page.
        layer: that reads it; it must be there before this layer runs.
    """

    buffer: torch.Tensor
    offset: int
    layer: int

    @property
    def nbytes(self) -> int:
        """Bytes of one page."""
        return self.buffer.shape[1]


@dataclass(frozen=True)
class PageShape:
    """What a page weighs, which is known before there is a pool.

    Attributes:
        page_tokens: tokens of a page.
        layers: bytes of the pieces of each layer that has pages.
        decoded: bytes that each byte takes in what attention reads of streamed pages; 0 where it reads them as they
            lie.
        whole_prompts: see :class:`KVLayout`.
    """

    page_tokens: int
    layers: tuple[tuple[int, ...], ...]
    decoded: int = 0
    whole_prompts: bool = False

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers."""
        return sum(map(sum, self.layers))


class KVLayout(ABC):
    """How a kind of KV pool keeps a page. A layout may cover part of a pool, and a layer may have no pages.

    Args:
        page_tokens: tokens of a page.
        buffers: layer and uint8 ``[physical_pages + 1, bytes]`` of every piece, the layers in the order in which a
            forward pass reads them; in a host page the pieces follow each other in this order.

    Raises:
        ValueError: buffers that are not bytes of so many pages each, or layers out of their order.
    """

    kv_heads: int
    """Of :meth:`keys`, and so the next two; not there where a layout shows no keys."""
    head_dim: int
    compute_dtype: torch.dtype
    """In what keys are shown and queries are kept."""
    decoded = 0
    """See :class:`PageShape`."""
    shows_keys = True
    """Who looks at keys finds them, and queries are those of attention; else the model has an index of its own."""
    whole_prompts = False
    """All pages of a prompt are on the device while it is prefilled: none is streamed, none left out."""
    page_tables = False
    """Attention reads tables of physical pages. Slots stay virtual in all that SGLang computes, and who writes into a
    page translates."""
    key_buffers: Mapping[int, torch.Tensor] = MappingProxyType({})
    """By layer, all keys as they lie, floats ``[slots, kv_heads, head_dim]``, for kernels that pick pages or tokens
    themselves; nothing where keys do not lie so, see :meth:`keys`."""
    index_buffers: Mapping[int, torch.Tensor] = MappingProxyType({})
    """By layer, keys of the model's own index as they lie, uint8 ``[physical_pages + 1, bytes]``; nothing where it has
    none."""

    def __init__(self, page_tokens: int, buffers: Iterable[tuple[int, torch.Tensor]]):
        self.page_tokens = page_tokens
        pieces: list[Piece] = []
        self.page_bytes = 0
        for layer, buffer in buffers:
            first = pieces[0].buffer if pieces else buffer
            if buffer.dtype != torch.uint8 or buffer.ndim != 2 or not buffer.is_contiguous():
                raise ValueError(
                    f"a buffer of layer {layer} is {buffer.dtype} {tuple(buffer.shape)} with strides "
                    f"{buffer.stride()}: give contiguous uint8 [pages, bytes]"
                )
            if len(buffer) != len(first):
                raise ValueError(f"a buffer of layer {layer} has {len(buffer)} pages, others have {len(first)}")
            if pieces and layer < pieces[-1].layer:
                raise ValueError(f"layer {layer} after layer {pieces[-1].layer}: give layers in their order")
            pieces.append(Piece(buffer, self.page_bytes, layer))
            self.page_bytes += buffer.shape[1]
        if not pieces:
            raise ValueError("no layer has pages: there is nothing to page")
        self.pieces = tuple(pieces)
        self.by_layer: dict[int, tuple[Piece, ...]] = {
            layer: tuple(piece for piece in pieces if piece.layer == layer)
            for layer in dict.fromkeys(piece.layer for piece in pieces)
        }
        """Pieces of every layer that has pages, the layers in their order."""

    @property
    def physical_pages(self) -> int:
        """Pages of the device pool, without the padding page."""
        return len(self.pieces[0].buffer) - 1

    @property
    def device(self) -> torch.device:
        return self.pieces[0].buffer.device

    @property
    def shape(self) -> PageShape:
        layers = tuple(tuple(piece.nbytes for piece in pieces) for pieces in self.by_layer.values())
        return PageShape(self.page_tokens, layers, self.decoded, self.whole_prompts)

    @abstractmethod
    def keys(self, layer: int, physical: torch.Tensor) -> torch.Tensor | None:
        """Keys of device pages, for who must look inside: Quest, the recorder, an indexer.

        Args:
            layer: one that has pages.
            physical: int64 ``[n]`` on the device.

        Returns:
            Floats ``[n, page_tokens, kv_heads, head_dim]``; None when the model has an index of its own.
        """

    def keys_of(self, layers: Sequence[int], physical: torch.Tensor) -> torch.Tensor:
        """:meth:`keys` of several layers, ``[n, page_tokens, layers, kv_heads, head_dim]``.

        Raises:
            ValueError: the layout shows no keys.
        """
        shown = [keys for layer in layers if (keys := self.keys(layer, physical)) is not None]
        if not shown:
            raise ValueError(f"a {type(self).__name__} shows no keys: the model's own index must choose pages")
        return torch.stack(shown, dim=2)

    @abstractmethod
    def staged(self, layer: int, block: tuple[torch.Tensor, ...]) -> Any:
        """What this layout's attention reads of a block of streamed pages.

        Args:
            layer: one that has pages.
            block: uint8 ``[pages, bytes]`` for each of its pieces.
        """

    def staged_raw(self, layer: int, block: tuple[torch.Tensor, ...]) -> Any:
        """As :meth:`staged`, but in the type in which the pool keeps it, without a copy; see :meth:`scales`."""
        return self.staged(layer, block)

    def scales(self, layer: int) -> tuple[float, float]:
        """By what keys and values of a layer are multiplied after they are read as they lie."""
        return 1.0, 1.0

    @property
    def scaled(self) -> bool:
        """Whether any layer's :meth:`scales` are not 1."""
        return any(self.scales(layer) != (1.0, 1.0) for layer in self.by_layer)


def as_pages(buffer: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """A pool's buffer ``[slots, ...]`` as uint8 ``[pages, bytes]``, without a copy.

    Raises:
        ValueError: it is not contiguous, or holds a part of a page.
    """
    if not buffer.is_contiguous():
        raise ValueError(f"pool buffer with strides {buffer.stride()} is not contiguous: pages cannot be copied")
    if len(buffer) % page_tokens:
        raise ValueError(f"a pool buffer of {len(buffer)} slots is not whole pages of {page_tokens} tokens")
    return buffer.view(len(buffer) // page_tokens, -1).view(torch.uint8)
