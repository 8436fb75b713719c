"""Which of our caches a server gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

from sglang_lsa.patches.releases import installed
from sglang_lsa.radix_ext.swa_allocator import LsaSwaAllocator

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


def build_tree_cache(params, runtime: LSARuntime) -> BasePrefixCache:
    """The radix tree of the model's kind, or with ``--disable-radix-cache`` what SGLang uses in its place."""
    if installed().checkpoints:
        from sglang_lsa.radix_ext.checkpoint_cache import LSACheckpointCache

        return LSACheckpointCache(params, runtime)
    if isinstance(params.token_to_kv_pool_allocator, LsaSwaAllocator):
        from sglang_lsa.radix_ext.unified_cache import LSASwaChunkCache, LSAUnifiedRadixCache

        return (LSASwaChunkCache if params.disable else LSAUnifiedRadixCache)(params, runtime)
    from sglang_lsa.radix_ext.finishing_cache import LSAChunkCache, LSARadixCache

    return (LSAChunkCache if params.disable else LSARadixCache)(params, runtime)
