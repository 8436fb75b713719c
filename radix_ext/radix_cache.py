"""LSARadixCache: SGLang's radix tree over virtual pages, keeping only exact KV and telling the lookahead what moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, MatchPrefixParams
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sglang_lsa.patches.requests import key_of, slots_up_from
from sglang_lsa.radix_ext.exact_tokens import ExactTokens, NothingShared
from sglang_lsa.radix_ext.swa_allocator import LsaSwaAllocator

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


def build_tree_cache(params, runtime: LSARuntime) -> BasePrefixCache:
    """The radix tree of the model's kind, or with ``--disable-radix-cache`` what SGLang uses in its place."""
    if isinstance(params.token_to_kv_pool_allocator, LsaSwaAllocator):
        from sglang_lsa.radix_ext.unified_cache import LSASwaChunkCache, LSAUnifiedRadixCache

        return (LSASwaChunkCache if params.disable else LSAUnifiedRadixCache)(params, runtime)
    return (LSAChunkCache if params.disable else LSARadixCache)(params, runtime)


class LSAChunkCache(NothingShared, ChunkCache):
    """SGLang's cache without a tree."""


class LSARadixCache(ExactTokens, RadixCache):
    """SGLang's radix tree of models without a sliding window, whose pages always win over a request's."""

    def cache_unfinished_req(self, req, chunked=False):
        """Insert what has been prefilled; pages that the tree already has replace the request's own.

        Holds move to the tree's pages first: SGLang frees the request's while it inserts. What was computed over a
        resident prefix stays out of the tree, as if there were none.
        """
        if not self._may_insert(req):
            slots = self.req_to_token_pool.req_to_token[req.req_pool_idx, : len(req.get_fill_ids())]
            req.prefix_indices = slots.to(dtype=torch.int64, copy=True)
            return
        tokens = req.get_fill_ids()
        key = RadixKey(tokens, req.extra_key, is_bigram=self.is_eagle).page_aligned(self.page_size)
        match = self.match_prefix(MatchPrefixParams(key=key))
        name, row = key_of(req), req.req_pool_idx
        with self._known(req, own := self.lsa.shared.known(name, row)):
            shared = self.page_index.matched(match.device_indices, slots_up_from(match.last_device_node))
            self.lsa.shared.replaced(name, row, len(tokens), own, shared)
            super().cache_unfinished_req(req, chunked=chunked)

    # -- pages of nodes, on the host -----------------------------------------------------------------------------

    def _insert_helper(self, node, key, value, priority=0, chunked=False):
        known, length = self._inserting, len(key)
        had, node = super()._insert_helper(node, key, value, priority, chunked)
        if had < length:  # the node is new
            first, last = had // self.page_size, length // self.page_size
            if known is None or len(known) < last:
                known, first, last = self.page_index.pages(node.value), 0, None
            self.page_index.note(node.value, known[first:last])
        return had, node

    def _split_node(self, key, child, split_len):
        pages, cut = self.page_index.pages(child.value), split_len // self.page_size
        above = super()._split_node(key, child, split_len)
        self.page_index.note(above.value, pages[:cut])
        self.page_index.note(child.value, pages[cut:])
        return above
