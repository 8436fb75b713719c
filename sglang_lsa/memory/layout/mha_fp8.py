"""MHA in FP8: a byte for each number of keys and values, which are shown in the type that the model computes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.layout.mha import MhaLayout

Scales = Callable[[int], tuple[float, float]]
"""Of keys and values of a layer, as they are now: an update of the weights may change them."""


class MhaFp8Layout(KVLayout):
    """Pages move as the bytes that they are; who looks inside sees ``number * scale``.

    Args:
        keys, values: as for :class:`MhaLayout`, of bytes.
        page_tokens: tokens of a page.
        stored: the float8 type that the bytes are.
        compute_dtype: what the model computes in.
        scales: by what a layer's numbers were divided when they were stored.
    """

    def __init__(
        self,
        keys: Sequence[torch.Tensor | None],
        values: Sequence[torch.Tensor | None],
        page_tokens: int,
        stored: torch.dtype,
        compute_dtype: torch.dtype,
        scales: Scales = lambda layer: (1.0, 1.0),
    ):
        as_keys, as_values = (
            [part if part is None else part.view(stored) for part in parts] for parts in (keys, values)
        )
        self.raw = MhaLayout(as_keys, as_values, page_tokens)
        super().__init__(page_tokens, [(piece.layer, piece.buffer) for piece in self.raw.pieces])
        self.kv_heads, self.head_dim = self.raw.kv_heads, self.raw.head_dim
        self.compute_dtype, self.decoded = compute_dtype, compute_dtype.itemsize
        self._scales = scales

    def keys(self, layer: int, physical: torch.Tensor) -> torch.Tensor:
        bytes_ = self.by_layer[layer][0].buffer[physical]  # not every torch picks rows of float8
        numbers = bytes_.view(self.raw.compute_dtype).view(-1, self.page_tokens, self.kv_heads, self.head_dim)
        return self._decode(numbers, self.scales(layer)[0])

    def staged(self, layer: int, block: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, ``[tokens, kv_heads, head_dim]``, in tensors of their own."""
        keys, values = self.raw.staged(layer, block)
        of_keys, of_values = self.scales(layer)
        return self._decode(keys, of_keys), self._decode(values, of_values)

    def staged_raw(self, layer: int, block: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in float8, ``[tokens, kv_heads, head_dim]``, to be multiplied by :meth:`scales`."""
        return self.raw.staged(layer, block)

    def scales(self, layer: int) -> tuple[float, float]:
        return self._scales(layer)

    def _decode(self, numbers: torch.Tensor, scale: float) -> torch.Tensor:
        """Exact but for the product, which is rounded once."""
        decoded = numbers.to(self.compute_dtype)
        return decoded if scale == 1.0 else decoded.mul_(scale)
