"""LSAUnifiedRadixCache: SGLang's radix tree for models with a sliding window, over virtual pages.

Here the tree does not always win. A node whose window was given up (a "tombstone") takes the pages of a request that
computed the same tokens again, window included, unless a running request reads the node: then it keeps its pages, and
takes the window alone. So what a request holds is moved after the insertion, to the pages that its row names then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.chunk_cache import SWAChunkCache
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_lsa.patches.request_kv import slots_up_from
from sglang_lsa.patches.requests import key_of
from sglang_lsa.radix_ext.finishing_cache import Finishing, NothingShared
from sglang_lsa.radix_ext.swa_checkpoints import Checkpoints
from sglang_lsa.radix_ext.unified_tree import COMPONENTS, TREE_CORE

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


class LSASwaChunkCache(NothingShared, SWAChunkCache):
    """SGLang's cache without a tree, for models with a sliding window."""


class LSAUnifiedRadixCache(Finishing, UnifiedRadixCache):
    """SGLang's radix tree of models with a sliding window."""

    def __init__(self, params, runtime: LSARuntime):
        params.tree_components = (ComponentType.FULL, ComponentType.SWA)
        params.component_registry_override = COMPONENTS
        with envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override(TREE_CORE):
            super().__init__(params, runtime)

    @property
    def checkpoints(self) -> Checkpoints:
        """Where prompts find their prefix even when the pool of windows was full."""
        return self.components[ComponentType.SWA].checkpoints

    def reset(self):
        super().reset()
        self.checkpoints.clear()

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

    def _inserted(self, req, tokens: int) -> None:
        self._mark(req.last_node, tokens)

    def _mark(self, last: int, tokens: int | None) -> None:
        """Choose checkpoints on the way to this node, of a prompt that has so many tokens (None: more to come)."""
        found_again = None if tokens is None else tokens - self.swa_reprefill_tail_tokens()
        self.checkpoints.mark(self.tree_core.node_by_id(last), found_again)

    def _path(self, node: int) -> Iterator:
        """Slots of each node, from the one of this number up."""
        return slots_up_from(self.tree_core.node_by_id(node))
