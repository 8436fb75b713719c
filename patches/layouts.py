"""Which KV layout an SGLang pool has, by the type of the pool. A type that is not here is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.layout.dsv4 import RATIO, Dsv4Layout
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.layout.mha_fp8 import MhaFp8Layout, Scales

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def mha_layout(pool: MHATokenToKVPool, page_tokens: int, model_dtype: torch.dtype, scales: Scales) -> KVLayout:
    if pool.dtype not in FP8_DTYPES:
        return MhaLayout(pool.k_buffer, pool.v_buffer, page_tokens)
    return MhaFp8Layout(pool.k_buffer, pool.v_buffer, page_tokens, pool.dtype, model_dtype, scales)


def dsv4_layout(pool: DeepSeekV4TokenToKVPool, *_: Any) -> KVLayout:
    """Its pages are of one size, and no scale is applied to them from without."""
    layers = [layer for layer, ratio in enumerate(pool.compression_ratios) if ratio == RATIO]
    kv, index = pool.c4_kv_pool.kv_buffer, pool.c4_indexer_kv_pool.index_k_with_scale_buffer
    return Dsv4Layout(dict(zip(layers, kv, strict=True)), dict(zip(layers, index, strict=True)))


LAYOUTS: dict[type, Callable[[Any, int, torch.dtype, Scales], KVLayout]] = {
    MHATokenToKVPool: mha_layout,
    DeepSeekV4TokenToKVPool: dsv4_layout,
}
"""Makes the layout of a pool of exactly this type; arguments as for :func:`layout_of`."""


def layout_of(pool: Any, page_tokens: int, model_dtype: torch.dtype, scales: Scales) -> KVLayout:
    """The layout of the device pool that SGLang built.

    Args:
        page_tokens: tokens of a page, where the pool leaves that open.
        model_dtype: what the model computes in.
        scales: of keys and values of a layer, where a pool keeps them divided.

    Raises:
        TypeError: nobody knows how a pool of this type keeps its pages.
    """
    make = LAYOUTS.get(type(pool))
    if make is None:
        known = ", ".join(kind.__name__ for kind in LAYOUTS)
        raise TypeError(f"SGLang keeps KV in a {type(pool).__name__}, whose layout is not known (known: {known})")
    return make(pool, page_tokens, model_dtype, scales)
