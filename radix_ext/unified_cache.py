"""LSAUnifiedRadixCache: SGLang's radix tree for models with a sliding window, over virtual pages.

Here the tree does not always win. A node whose window was given up (a "tombstone") takes the pages of a request that
computed the same tokens again, window included, unless a running request reads the node: then it keeps its pages, and
takes the window alone. So what a request holds is moved after the insertion, to the pages that its row names then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.chunk_cache import SWAChunkCache
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_lsa.memory.pages import align_up
from sglang_lsa.patches.requests import key_of, request_gone, slots_up_from
from sglang_lsa.radix_ext.swa_checkpoints import Checkpoints
from sglang_lsa.radix_ext.unified_tree import COMPONENTS, TREE_CORE

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


class LSASwaChunkCache(SWAChunkCache):
    """No prefix sharing: every request's pages go when it does."""

    def __init__(self, params, runtime: LSARuntime):
        self.lsa = runtime
        super().__init__(params)

    def release_host_resources(self):
        """SGLang is going down in good order."""
        self.lsa.release()

    def cache_finished_req(self, req, is_insert=True, *, kv_len_to_handle):
        """Give everything back."""
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        pages = self.lsa.shared.known(key_of(req), req.req_pool_idx)
        request_gone(self.lsa, req)
        start = req.cache_protected_len
        with self.lsa.pager.page_index.row(row, pages):
            self.token_to_kv_pool_allocator.free_segment(row[start:kv_len_to_handle], start_pos=start)


class LSAUnifiedRadixCache(UnifiedRadixCache):
    """Inserts prompts, and generated tokens only on request: their KV was computed under pruned attention."""

    def __init__(self, params, runtime: LSARuntime):
        self.lsa = runtime
        self.page_index = runtime.pager.page_index
        self._inserting: np.ndarray | None = None
        """Pages of what is being inserted."""
        params.tree_components = (ComponentType.FULL, ComponentType.SWA)
        params.component_registry_override = COMPONENTS
        with envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override(TREE_CORE):
            super().__init__(params)

    @property
    def checkpoints(self) -> Checkpoints:
        """Where prompts find their prefix even when the pool of windows was full."""
        return self.components[ComponentType.SWA].checkpoints

    def reset(self):
        super().reset()
        self.checkpoints.clear()

    def release_host_resources(self):
        """SGLang is going down in good order."""
        super().release_host_resources()
        self.lsa.release()

    def swa_reprefill_tail_tokens(self):
        """How many of a prompt's last tokens SGLang prefills even on a full hit: their queries vote for pages."""
        return self.lsa.observer.positions

    def evict(self, params):
        result = super().evict(params)
        self.lsa.host_evicted_pages += result.num_tokens_evicted // self.page_size
        return result

    def match_prefix(self, params):
        """As SGLang's; the pages of the slots that it returns are noted with them."""
        result = super().match_prefix(params)
        if len(result.device_indices):
            pages = self.page_index.path(self._path(result.last_device_node))
            if pages is not None:
                self.page_index.note(result.device_indices, pages)
        return result

    def insert(self, params):
        """As SGLang's, which frees parts of what is inserted, and of what was there before."""
        pages = self._inserting
        if pages is not None and params.value is not None:
            pages = pages[: len(params.value) // self.page_size]
        with self.page_index.row(params.value, pages):
            return super().insert(params)

    def cache_unfinished_req(self, req, chunked=False, **options):
        """Insert what has been prefilled. Where the tree keeps its own pages, they replace the request's.

        What SGLang frees is held back until nothing of the request is in it any more. What was computed over a resident
        prefix stays out of the tree, as if there were none.
        """
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        tokens = len(req.get_fill_ids())
        if not self._may_insert(req):
            req.prefix_indices = row[:tokens].to(dtype=torch.int64, copy=True)
            return
        shared, name = self.lsa.shared, key_of(req)
        own = shared.known(name, req.req_pool_idx)
        if own is None:
            own = self.page_index.pages(row[:tokens])
        shared.after_passes()  # SGLang names other pages in the row of a request that may be decoding
        with self.token_to_kv_pool_allocator.full_attn_allocator.holding_back():
            with self._known(req, own):
                super().cache_unfinished_req(req, chunked=chunked, **options)
            trees = self.page_index.path(self._path(req.last_node))
            if trees is None:
                trees = self.page_index.pages(req.prefix_indices[: req.cache_protected_len])
            shared.replaced(name, req.req_pool_idx, tokens, own, trees)
        self._mark(req.last_node, None if chunked else tokens)

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
            self._mark(req.last_node, keep)

    def _mark(self, last: int, tokens: int | None) -> None:
        """Choose checkpoints on the way to this node, of a prompt that has so many tokens (None: more to come)."""
        found_again = None if tokens is None else tokens - self.swa_reprefill_tail_tokens()
        self.checkpoints.mark(self.tree_core.node_by_id(last), found_again)

    def _may_insert(self, req) -> bool:
        return self.lsa.config.cache_outputs or self.lsa.shared.is_exact(key_of(req))

    def _path(self, node: int) -> Iterator:
        """Slots of each node, from the one of this number up."""
        return slots_up_from(self.tree_core.node_by_id(node))

    @contextmanager
    def _known(self, req, pages: np.ndarray | None) -> Iterator[None]:
        """What SGLang inserts and frees inside are tokens of this request, whose pages are known (None: are not)."""
        self._inserting = pages
        try:
            with self.page_index.row(self.req_to_token_pool.req_to_token[req.req_pool_idx], pages):
                yield
        finally:
            self._inserting = None
