"""Which KV layout an SGLang pool has, by the type of the pool. A type that is not here is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.layout.mha import MhaLayout

LAYOUTS: dict[type, Callable[[Any, int], KVLayout]] = {
    MHATokenToKVPool: lambda pool, page_tokens: MhaLayout(pool.k_buffer, pool.v_buffer, page_tokens),
}
"""Makes the layout of a pool of exactly this type, with so many tokens a page."""


def layout_of(pool: Any, page_tokens: int) -> KVLayout:
    """The layout of the device pool that SGLang built.

    Raises:
        TypeError: nobody knows how a pool of this type keeps its pages.
    """
    make = LAYOUTS.get(type(pool))
    if make is None:
        known = ", ".join(kind.__name__ for kind in LAYOUTS)
        raise TypeError(f"SGLang keeps KV in a {type(pool).__name__}, whose layout is not known (known: {known})")
    return make(pool, page_tokens)
