"""Caches of SGLang 0.5.17, which tell a tree of running requests and of finished ones in two ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sglang_lsa.memory.pages import align_up
from sglang_lsa.patches.request_kv import slots_up_from
from sglang_lsa.patches.requests import key_of, request_gone
from sglang_lsa.radix_ext.exact_tokens import ExactTokens, NotedNodes

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


class NothingShared(ChunkCache):
    """Goes before an SGLang cache without a tree: every request's pages go when it does."""

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


class LSAChunkCache(NothingShared, ChunkCache):
    """SGLang's cache without a tree."""


class Finishing(ExactTokens):
    """Goes before an SGLang radix tree: of a request that is gone, prompts are inserted, and generated tokens only on
    request, since their KV was computed under pruned attention."""

    def cache_finished_req(self, req, is_insert=True, *, kv_len_to_handle, **options):
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
            super().cache_finished_req(req, is_insert=is_insert, kv_len_to_handle=keep, **options)
        if is_insert:
            self._inserted(req, keep)

    def _inserted(self, req, tokens: int) -> None:
        """The first tokens of a request that is gone are in the tree."""


class LSARadixCache(Finishing, NotedNodes, RadixCache):
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
