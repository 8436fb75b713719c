"""DeepSeek-V4: of the layers that keep one entry for four tokens, the entries and the model's own index keys of them.

All else that such a model keeps of a token is small, or of its last tokens only, and stays where SGLang has it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sglang_lsa.memory.layout.base import KVLayout, PageShape

PAGE_TOKENS = 256
RATIO = 4
"""Tokens of an entry."""
ENTRIES = PAGE_TOKENS // RATIO
KV_ROW = 37_440
"""Bytes of a page's entries in a layer: 64 of 448 FP8 and 64 bfloat16 numbers, then their scales, 8 bytes each, filled
up to a multiple of 576."""
INDEX_ROW = 8_448
"""Bytes of a page's index keys in a layer: 64 of 128 FP8 numbers, then 64 float32 scales."""


class Dsv4Layout(KVLayout):
    """A host page has the layers in their order, of each its row of entries, then its row of index keys.

    Within a row the numbers of all entries come before all scales: rows are moved as they are, and only the page number
    changes. Attention reads tables of physical pages, so that slots stay virtual, and the model's own index says what
    a page has.

    Args:
        kv: by layer, uint8 ``[physical_pages + 1, KV_ROW]``, SGLang's own buffers.
        index: of the same layers, uint8 ``[physical_pages + 1, INDEX_ROW]``.

    Raises:
        ValueError: rows of other sizes, layers that have only one of the two, or none at all.
    """

    shows_keys = False
    whole_prompts = True
    page_tables = True

    def __init__(self, kv: Mapping[int, torch.Tensor], index: Mapping[int, torch.Tensor]):
        if halves := sorted(set(kv) ^ set(index)):
            raise ValueError(f"layer {halves[0]} has entries or index keys only: give both")
        for name, buffers, width in (("entries", kv, KV_ROW), ("index keys", index, INDEX_ROW)):
            for layer, buffer in buffers.items():
                if buffer.ndim != 2 or buffer.shape[1] != width:
                    raise ValueError(
                        f"{name} of layer {layer} are {tuple(buffer.shape)}: give [pages, {width}], rows of pages of "
                        f"{PAGE_TOKENS} tokens with FP8 index keys"
                    )
        self.kv_buffers = {layer: kv[layer] for layer in sorted(kv)}
        self.index_buffers = {layer: index[layer] for layer in sorted(kv)}
        super().__init__(
            PAGE_TOKENS,
            [(layer, part) for layer in sorted(kv) for part in (self.kv_buffers[layer], self.index_buffers[layer])],
        )

    def keys(self, layer: int, physical: torch.Tensor) -> None:
        return None

    def staged(self, layer: int, block: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Rows of entries and of index keys, as they are in the pool."""
        return block


def dsv4_shape(layers: int) -> PageShape:
    """What a page weighs in a model with so many layers of ratio 4.

    Raises:
        ValueError: it has none.
    """
    if layers < 1:
        raise ValueError(f"the model has {layers} layers that keep one entry for {RATIO} tokens: there is no page")
    return PageShape(PAGE_TOKENS, ((KV_ROW, INDEX_ROW),) * layers, whole_prompts=True)
