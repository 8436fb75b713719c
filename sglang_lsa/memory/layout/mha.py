"""MHA: keys and values of every KV head, in a buffer each for every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_lsa.memory.layout.base import KVLayout, PageShape, as_pages


class MhaLayout(KVLayout):
    """A host page has the layers in their order, of each its keys ``[page, kv_heads, head_dim]``, then its values.

    Args:
        keys, values: per layer ``[(physical_pages + 1) * page_tokens, kv_heads, head_dim]``, SGLang's own buffers; None
            for a layer without pages. Keys and values may differ in ``head_dim``.
        page_tokens: tokens of a page.
    """

    def __init__(self, keys: Sequence[torch.Tensor | None], values: Sequence[torch.Tensor | None], page_tokens: int):
        pairs = list(enumerate(zip(keys, values, strict=True)))
        if halves := [layer for layer, (k, v) in pairs if (k is None) != (v is None)]:
            raise ValueError(f"layer {halves[0]} has keys or values only: give both, or None for both")
        self.key_buffers = {layer: k for layer, (k, _) in pairs if k is not None}
        self.value_buffers = {layer: v for layer, (_, v) in pairs if v is not None}
        super().__init__(
            page_tokens,
            [(layer, as_pages(part, page_tokens)) for layer, pair in pairs for part in pair if part is not None],
        )
        first = next(iter(self.key_buffers.values()))
        _, self.kv_heads, self.head_dim = first.shape
        self.compute_dtype = first.dtype

    def keys(self, layer: int, physical: torch.Tensor) -> torch.Tensor:
        return self.key_buffers[layer].unflatten(0, (-1, self.page_tokens))[physical]

    def staged(self, layer: int, block: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, ``[tokens, kv_heads, head_dim]``."""
        keys, values = block
        return _tokens(keys, self.key_buffers[layer]), _tokens(values, self.value_buffers[layer])


def _tokens(block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bytes of pages as the tokens that they are, shaped and typed as in the pool."""
    return block.view(like.dtype).view(-1, *like.shape[1:])


def mha_shape(
    page_tokens: int, layers: int, kv_heads: int, head_dim: int, v_head_dim: int, itemsize: int, decoded: int = 0
) -> PageShape:
    """What a page of such a pool weighs, every layer having pages; ``decoded`` as in :class:`PageShape`."""
    token = kv_heads * itemsize
    layer = page_tokens * token * head_dim, page_tokens * token * v_head_dim
    return PageShape(page_tokens, (layer,) * layers, decoded)
