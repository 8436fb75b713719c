"""Trees that keep tokens that are exact alone, whichever SGLang they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

from sglang_lsa.patches.request_kv import row_of
from sglang_lsa.patches.requests import key_of

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


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

    def swa_reprefill_tail_tokens(self, req=None):
        """How many of a prompt's last tokens SGLang prefills even on a full hit: their queries vote for pages.

        SGLang asks this for models whose sliding window must be recomputed; the need is the same.
        """
        return self.lsa.observer.positions

    def _may_insert(self, req) -> bool:
        return self.lsa.config.cache_outputs or self.lsa.shared.is_exact(key_of(req))

    @contextmanager
    def _known(self, req, pages: np.ndarray | None) -> Iterator[None]:
        """What SGLang inserts and frees inside are tokens of this request, whose pages are known (None: are not)."""
        self._inserting = pages
        try:
            with self.page_index.row(self.req_to_token_pool.req_to_token[row_of(req)], pages):
                yield
        finally:
            self._inserting = None


class NotedNodes(ExactTokens):
    """Goes before SGLang's ``RadixCache``: pages of its nodes are known on the host."""

    def _insert_helper(self, node, key, value, *arguments, **options):
        known, length = self._inserting, len(key)
        had, node = super()._insert_helper(node, key, value, *arguments, **options)
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
