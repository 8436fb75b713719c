"""LSACheckpointCache: the cache of SGLang 0.5.23, which tells a tree of running and finished requests in one way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sglang_lsa.patches.request_kv import slots_up_from
from sglang_lsa.patches.requests import key_of, request_gone
from sglang_lsa.radix_ext.exact_tokens import NotedNodes


@dataclass(frozen=True)
class Leaving:
    """The request that is being released, which the core has forgotten already.

    Attributes:
        row: in SGLang's table.
        pages: of its tokens, as far as they are known on the host; None for nothing.
        exact: whether its tokens may enter the tree.
    """

    row: int
    pages: np.ndarray | None
    exact: bool


class LSACheckpointCache(NotedNodes, RadixCache):
    """SGLang's radix tree of models without a sliding window, whose pages always win over a request's; with
    ``--disable-radix-cache`` it holds nothing.

    SGLang releases a request in this order: ``claim_kv_row``, ``checkpoint`` where its tokens are to be kept,
    ``free_kv_row``, ``on_release``.
    """

    _leaving: Leaving | None = None

    def claim_kv_row(self, req):
        """A request finished, was aborted or retracted."""
        row = req.kv.req_pool_idx
        self._leaving = Leaving(row, self.lsa.shared.known(key_of(req), row), self._may_insert(req))
        request_gone(self.lsa, req)
        return super().claim_kv_row(req)

    def on_release(self, req, *, checkpointed):
        self._leaving = None
        super().on_release(req, checkpointed=checkpointed)

    def free_kv_row(self, kv, ranges):
        leaving = self._leaving
        pages = leaving.pages if leaving is not None and leaving.row == kv.req_pool_idx else None
        with self.page_index.row(self.req_to_token_pool.req_to_token[kv.req_pool_idx], pages):
            super().free_kv_row(kv, ranges)

    def checkpoint(self, req, *, up_to, **options):
        """Insert what has been prefilled; of a request that is released the prompt (and the output, with
        ``cache_outputs``). What was computed over a resident prefix stays out of the tree; SGLang frees it."""
        if self.disable:
            return
        if (leaving := self._leaving) is None:
            if self._may_insert(req):
                self._checkpoint_running(req, up_to, options)
        elif leaving.exact:
            if not self.lsa.config.cache_outputs:
                # What a retracted request had generated was prefilled exactly when it came back, and is in the tree.
                up_to = min(up_to, max(len(req.origin_input_ids), req.kv.cache_protected_len))
            with self._known(req, leaving.pages):
                super().checkpoint(req, up_to=up_to, **options)

    def _checkpoint_running(self, req, up_to: int, options) -> None:
        """Pages that the tree already has replace the request's own. Holds move to the tree's pages first: SGLang frees
        the request's while it inserts."""
        salt = {"extra_key": req.extra_key, "cache_salt": req.cache_salt}
        key = RadixKey(req.full_untruncated_fill_ids[:up_to], is_bigram=self.is_eagle, **salt)
        node = self.match_prefix(MatchPrefixParams(key=key.page_aligned(self.page_size))).last_device_node
        name, row = key_of(req), req.kv.req_pool_idx
        with self._known(req, own := self.lsa.shared.known(name, row)):
            shared = self.page_index.matched(self.path_device_indices(node), slots_up_from(node))
            self.lsa.shared.replaced(name, row, up_to, own, shared)
            super().checkpoint(req, up_to=up_to, **options)
