"""Which KV layout an SGLang pool has, by the type of the pool. A type that is not here is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.layout.mha_fp8 import MhaFp8Layout, Scales

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def mha_layout(pool: MHATokenToKVPool, page_tokens: int, model_dtype: torch.dtype, scales: Scales) -> KVLayout:
    if pool.dtype not in FP8_DTYPES:
        return MhaLayout(pool.k_buffer, pool.v_buffer, page_tokens)
    return MhaFp8Layout(pool.k_buffer, pool.v_buffer, page_tokens, pool.dtype, model_dtype, scales)


LAYOUTS: dict[type, Callable[[Any, int, torch.dtype, Scales], KVLayout]] = {MHATokenToKVPool: mha_layout}
"""Makes the layout of a pool of exactly this type; arguments as for :func:`layout_of`."""


def layout_of(pool: Any, page_tokens: int, model_dtype: torch.dtype, scales: Scales) -> KVLayout:
    """The layout of the device pool that SGLang built.

    Args:
        page_tokens: tokens of a page.
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
