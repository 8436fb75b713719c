"""One scheduler's memory for a model with a sliding window: SGLang's own tree and allocators, on the CPU."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from simulated_swa import swa_allocator

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_complete
from sglang_lsa.radix_ext.radix_cache import build_tree_cache


class Server:
    """One scheduler's memory, with requests that compute nothing; every page has a place on the device."""

    def __init__(
        self,
        page: int = 16,
        window: int = 8,
        swa_pages: int = 64,
        virtual: int = 200,
        rows: int = 6,
        disable: bool = False,
    ):
        self.page, self.window = page, window
        keys, values = ([torch.zeros((virtual + 1) * page, 1, 1)] for _ in range(2))
        self.pager = Pager(MhaLayout(keys, values, page), virtual)
        self.ledger = self.pager.ledger
        self.allocator: Any = swa_allocator(self.pager, swa_pages)
        self.table = torch.zeros((rows, virtual * page), dtype=torch.int32)
        self.runtime = LSARuntime(LSAConfig(debug=True), self.pager, self.table, 1, 1.0)
        self.runtime.observer = SimpleNamespace(positions=1)  # type: ignore[assignment]
        pool = SimpleNamespace(req_to_token=self.table, write=self.table.__setitem__)
        params = CacheInitParams(
            disable=disable,
            req_to_token_pool=pool,  # type: ignore[arg-type]
            token_to_kv_pool_allocator=self.allocator,
            page_size=page,
            sliding_window_size=window,
        )
        self.tree: Any = build_tree_cache(params, self.runtime)
        self.rows = list(range(1, rows))

    @property
    def places(self) -> torch.Tensor:
        return self.allocator.full_to_swa_index_mapping

    def match(self, tokens: list[int]) -> Any:
        return self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens), None)))

    def come(self, rid: str, tokens: list[int], chunk: int | None = None) -> Any:
        """A prompt is matched, locked and prefilled."""
        req: Any = SimpleNamespace(rid=rid, lsa_key=rid, origin_input_ids=array("q", tokens), output_ids=array("q"))
        req.extra_key, req.session, req.priority, req.req_pool_idx = None, None, 0, self.rows.pop()
        req.finished, req.skip_radix_cache_insert, req.swa_prefix_lock_released = (lambda: False), False, False
        found = self.match(tokens[:-1])
        req.prefix_indices, req.last_node = found.device_indices, found.last_device_node
        req.cache_protected_len = begin = len(req.prefix_indices)
        lock = self.tree.inc_lock_ref(req.last_node)
        req.swa_uuid_for_lock, req.skip_lock_node_ids = lock.swa_uuid_for_lock, lock.skip_lock_node_ids
        req.kv = ReqKvInfo(kv_allocated_len=0, swa_evicted_seqlen=0)
        self.table[req.req_pool_idx, :begin] = req.prefix_indices.int()
        pages = self.pager.page_index.matched(req.prefix_indices, ())
        self.runtime.requests[rid] = Request(rid, req.req_pool_idx, Asked("full", 1.0), pages=pages)
        assert self.pager.hold(rid, pages)
        chunk = chunk or len(tokens)
        for end in [*range(begin + chunk, len(tokens), chunk), len(tokens)]:
            self.extend(req, begin, end)
            req.get_fill_ids = lambda end=end: req.origin_input_ids[:end]
            self.tree.cache_unfinished_req(req, chunked=end < len(tokens))
            self.check_request(req)
            begin = end
        return req

    def extend(self, req: Any, begin: int, end: int) -> None:
        missing = (end - begin + 2 * self.page) - self.allocator.swa_available_size()
        if missing > 0:
            self.tree.evict(EvictParams(num_tokens=0, swa_num_tokens=missing))
        before, after = torch.tensor([begin]), torch.tensor([end])
        row = self.table[req.req_pool_idx]
        last = torch.tensor([int(row[begin - 1]) if begin else -1])
        row[begin:end] = self.allocator.alloc_extend(before, before, after, after, last, end - begin).int()
        request, opened = self.runtime.requests[req.rid], self.allocator.take_new_pages()
        request.pages, request.tokens = np.concatenate((request.pages, opened)), end
        assert self.pager.hold(req.rid, opened)
        self.pager.store(request.pages[pages_complete(begin, self.page) : pages_complete(end, self.page)])
        req.kv.kv_allocated_len = end

    def end(self, req: Any, insert: bool = True) -> None:
        self.tree.cache_finished_req(req, is_insert=insert, kv_len_to_handle=req.kv.kv_allocated_len)
        self.rows.append(req.req_pool_idx)
        self.ledger.check()

    def check_request(self, req: Any) -> None:
        """It holds the pages that its row names, and the ledger is in order."""
        row = self.table[req.req_pool_idx, : req.kv.kv_allocated_len : self.page] // self.page
        request = self.runtime.requests[req.rid]
        assert request.pages.tolist() == row.tolist()
        assert self.ledger.held_by(req.rid) == set(row.tolist())
        self.ledger.check()

    def pages(self, req: Any) -> list[int]:
        return self.runtime.requests[req.rid].pages.tolist()

    def forget_windows(self, but: int = 1) -> None:
        """The pool of windows is full: all go but those of so many checkpoints, which no leaf loses."""
        while self.tree.swa_evictable_size() > but * self.page:
            assert self.tree.evict(EvictParams(num_tokens=0, swa_num_tokens=1)).swa_num_tokens_evicted

    def assert_idle(self) -> None:
        """Nothing runs: each slot is free or the tree's."""
        self.tree.sanity_check()
        assert self.allocator.full_available_size() + self.tree.full_evictable_size() == self.allocator.size_full
        assert self.allocator.swa_available_size() + self.tree.swa_evictable_size() == self.allocator.size_swa
        assert self.ledger.held_pages == 0
        self.ledger.check()


def text(first: int, tokens: int) -> list[int]:
    return list(range(first, first + tokens))
