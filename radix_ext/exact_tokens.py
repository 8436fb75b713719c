"""What SGLang's caches have in common here: the lookahead hears who is gone, trees keep tokens that are exact alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.chunk_cache import ChunkCache

from sglang_lsa.memory.pages import align_up
from sglang_lsa.patches.requests import key_of, request_gone

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


class ExactTokens(BasePrefixCache):
    """Goes before an SGLang radix tree: prompts are inserted, and generated tokens only on request, since their KV was
    computed under pruned attention."""

    def __init__(self, params, runtime: LSARuntime):
        self.lsa = runtime
        self.page_index = runtime.pager.page_index
        self._inserting: np.ndarray | None = None
        """Pages of what is being inserted."""
        super().__init__(params)

    def release_host_resources(self):
        """SGLang is going down in good order."""
        super().release_host_resources()
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

    def _may_insert(self, req) -> bool:
        return self.lsa.config.cache_outputs or self.lsa.shared.is_exact(key_of(req))

    @contextmanager
    def _known(self, req, pages: np.ndarray | None) -> Iterator[None]:
        """What SGLang inserts and frees inside are tokens of this request, whose pages are known (None: are not)."""
        self._inserting = pages
        try:
            with self.page_index.row(self.req_to_token_pool.req_to_token[req.req_pool_idx], pages):
                yield
        finally:
            self._inserting = None
