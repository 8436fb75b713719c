"""LSARadixCache: SGLang's radix tree over virtual pages, keeping only exact KV and telling the lookahead what moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, MatchPrefixParams
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sglang_lsa.memory.pages import align_up
from sglang_lsa.patches.requests import key_of, request_gone, slots_up_from
from sglang_lsa.radix_ext.swa_allocator import LsaSwaAllocator

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


def build_tree_cache(params, runtime: LSARuntime) -> BasePrefixCache:
    """The radix tree of the model's kind, or with ``--disable-radix-cache`` what SGLang uses in its place."""
    if isinstance(params.token_to_kv_pool_allocator, LsaSwaAllocator):
        from sglang_lsa.radix_ext.unified_cache import LSASwaChunkCache, LSAUnifiedRadixCache

        return (LSASwaChunkCache if params.disable else LSAUnifiedRadixCache)(params, runtime)
    return (LSAChunkCache if params.disable else LSARadixCache)(params, runtime)


class LSAChunkCache(ChunkCache):
    """No prefix sharing: every request's pages go when it does."""

    def __init__(self, params, runtime: LSARuntime):
        self.lsa = runtime
        super().__init__(params)

    def release_host_resources(self):
        """SGLang is going down in good order."""
        self.lsa.release()

    def cache_finished_req(self, req, is_insert=True, *, kv_len_to_handle):
        """Give everything back; as SGLang's own, which searches for distinct pages on the device and waits for it."""
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        pages = self.lsa.shared.known(key_of(req), req.req_pool_idx)
        request_gone(self.lsa, req)
        start = req.cache_protected_len
        with self.lsa.pager.page_index.row(row, pages):
            self.token_to_kv_pool_allocator.free_segment(row[start:kv_len_to_handle], start_pos=start)


class LSARadixCache(RadixCache):
    """Inserts prompts, and generated tokens only on request: their KV was computed under pruned attention."""

    def __init__(self, params, runtime: LSARuntime):
        self.lsa = runtime
        self.page_index = runtime.pager.page_index
        self._inserting: np.ndarray | None = None
        """Pages of what is being inserted."""
        super().__init__(params)

    def release_host_resources(self):
        """SGLang is going down in good order."""
        self.lsa.release()

    def evict(self, params):
        result = super().evict(params)
        self.lsa.host_evicted_pages += result.num_tokens_evicted // self.page_size
        return result

    def swa_reprefill_tail_tokens(self):
        """How many of a prompt's last tokens SGLang prefills even on a full hit: their queries vote for pages.

        SGLang asks this for models whose sliding window must be recomputed; the need is the same.
        """
        return self.lsa.observer.positions

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

    def cache_finished_req(self, req, is_insert=True, *, kv_len_to_handle):
        """Insert the prompt (and the output, with ``cache_outputs``) and give everything else back."""
        is_insert = is_insert and self._may_insert(req)
        pages = self.lsa.shared.known(key_of(req), req.req_pool_idx)
        request_gone(self.lsa, req)
        keep = kv_len_to_handle
        with self._known(req, pages):
            if is_insert and not self.lsa.config.cache_outputs:
                # What a retracted request had generated was prefilled exactly when it came back, and is in the tree.
                keep = min(keep, max(len(req.origin_input_ids), req.cache_protected_len))
                # Pages after the one that holds the last of these tokens carry generated tokens alone.
                first_generated = align_up(keep, self.page_size)
                if first_generated < kv_len_to_handle:
                    row = self.req_to_token_pool.req_to_token[req.req_pool_idx, first_generated:kv_len_to_handle]
                    self.token_to_kv_pool_allocator.free_segment(row, start_pos=first_generated)
            super().cache_finished_req(req, is_insert=is_insert, kv_len_to_handle=keep)

    def _may_insert(self, req) -> bool:
        return self.lsa.config.cache_outputs or self.lsa.shared.is_exact(key_of(req))

    # -- pages of nodes, on the host -----------------------------------------------------------------------------

    @contextmanager
    def _known(self, req, pages: np.ndarray | None) -> Iterator[None]:
        """What SGLang inserts and frees inside are tokens of this request, whose pages are known (None: are not)."""
        self._inserting = pages
        try:
            with self.page_index.row(self.req_to_token_pool.req_to_token[req.req_pool_idx], pages):
                yield
        finally:
            self._inserting = None

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
