"""The simulated scheduler over SGLang's own radix tree for models with a sliding window, and its own allocator.

Beside the pages that the pager moves, a model has KV that is never moved: some lies where virtual pages say, some in
the pages of the window. All of it is written and read here, too, with every pass, and must be the request's own.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams, EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import free_swa_out_of_window_slots
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.utils import get_num_new_pages
from simulated_gpu import SimulatedGPU
from simulated_scheduler import Scheduler
from simulated_work import UNWRITTEN, Entry, Req, slots_of
from simulation import Simulation

from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.radix_ext.radix_cache import build_tree_cache
from sglang_lsa.radix_ext.swa_allocator import LsaSwaAllocator


class PagesOnCpu(PagedTokenToKVPoolAllocator):
    """SGLang's own launches kernels."""

    def alloc_extend(
        self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages=None
    ):
        pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu)
        if pages > len(self.free_pages):
            return None
        slots = torch.empty((extend_num_tokens,), dtype=torch.int64)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device)
        self.free_pages = self.free_pages[pages:]
        return slots

    def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc):
        before = seq_lens - 1
        return self.alloc_extend(before, before, seq_lens, seq_lens, last_loc, len(seq_lens))


class WindowPool(BaseSWAKVPool):
    """A pool without tensors, which maps slots."""

    def __init__(self) -> None:
        self.full_to_swa_index_mapping = torch.zeros(0)

    def register_mapping(self, full_to_swa_index_mapping):
        self.full_to_swa_index_mapping = full_to_swa_index_mapping

    def translate_loc_from_full_to_swa(self, kv_indices):
        return self.full_to_swa_index_mapping[kv_indices]


WindowPool.__abstractmethods__ = frozenset()


def swa_allocator(pager: Pager, swa_pages: int) -> LsaSwaAllocator:
    """Over all virtual pages of ``pager``, on the CPU."""
    page, pool = pager.page, WindowPool()
    allocator = LsaSwaAllocator(
        pager.ledger.virtual_pages * page, swa_pages * page, page, torch.float32, "cpu", pool, pager
    )
    allocator.swa_attn_allocator = PagesOnCpu(swa_pages * page, page, torch.float32, "cpu", None, False)
    return allocator


def locked_by(req: Any) -> tuple[int, DecLockRefParams]:
    """What SGLang is given back when a request lets go of its node."""
    found = DecLockRefParams(swa_uuid_for_lock=req.swa_uuid_for_lock, skip_lock_node_ids=req.skip_lock_node_ids)
    return req.last_node, found


@contextmanager
def freeing_early(value: bool) -> Iterator[None]:
    """Whether what is inserted has lost the windows that it does not need; comes to an end in errors, too."""
    flag = envs.SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS
    flag.set(value)
    try:
        yield
    finally:
        flag.clear()


class SwaScheduler(Scheduler):
    """Its requests have what SGLang's have beside: ``kv``, ``last_node`` and the like."""

    def __init__(self, runtime: LSARuntime, gpu: SimulatedGPU, chance: random.Random, chunk: int, overlap: bool):
        super().__init__(runtime, gpu, chance, chunk, overlap)
        page, virtual = self.page, self.pager.ledger.virtual_pages
        self.window = chance.choice([page // 2, page // 2, page, 2 * page])
        self.swa_pages = chance.choice([40, 48, 64, 160])
        self.releases_early = chance.random() < 0.3
        """Whether a request lets go of its prompt's window once it has passed it."""
        self.frees_early = chance.random() < 0.5
        """Whether a chunk's tokens outside of the window lose it before they are inserted."""
        self.swa: Any = swa_allocator(self.pager, self.swa_pages)
        pool = SimpleNamespace(req_to_token=runtime.req_to_token, write=runtime.req_to_token.__setitem__)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=pool,
            token_to_kv_pool_allocator=self.swa,
            page_size=page,
            sliding_window_size=self.window,
        )
        self.cache: Any = build_tree_cache(params, runtime)
        self.allocator = self.swa
        self.pager.page_index.checked = True
        self.content = np.full((virtual + 1) * page, UNWRITTEN)
        """Of KV that lies where virtual pages say."""
        self.window_content = np.full((self.swa_pages + 1) * page, UNWRITTEN)
        self.cache.checkpoints.spacing = 4 * max(page, self.cache.checkpoints.tail)
        self._count_hand_overs()

    def _count_hand_overs(self) -> None:
        """How often a tree took a request's pages, and how often it kept those that somebody reads."""
        component: Any = self.cache.components[ComponentType.SWA]
        apply, inherit = component.apply_component_action, self.pager.inherit

        def applied(action: Any) -> None:
            self.counts[type(action).__name__] += 1
            apply(action)

        def inherited(old: np.ndarray, new: np.ndarray) -> None:
            self.counts["pages adopted"] += len(new)
            inherit(old, new)

        component.apply_component_action, self.pager.inherit = applied, inherited

    def step(self) -> bool:
        ran = super().step()
        self.check_tree()
        return ran

    # -- admission -----------------------------------------------------------------------------------------------

    def _begin_round(self, req: Any) -> None:
        if not isinstance(req.origin_input_ids, array):
            req.origin_input_ids, req.output_ids = array("q", req.origin_input_ids), array("q")
            req.session = None
        ids = req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids
        limit = max(0, len(ids) - self.cache.swa_reprefill_tail_tokens())
        found = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(ids, req.extra_key, limit=limit)))
        req.prefix_indices, req.last_node = found.device_indices, found.last_device_node
        req.cache_protected_len = len(req.prefix_indices)
        req.matched = [SimpleNamespace(page=slot // self.page) for slot in req.prefix_indices[:: self.page].tolist()]
        self.counts["tokens matched"] += len(req.prefix_indices)
        self.counts["tokens matched but for the window"] += found.full_kv_hit_length - len(req.prefix_indices)

    def _lock(self, req: Any, nodes: list[Any]) -> None:
        if req.locked is not None:
            self.cache.dec_lock_ref(*req.locked)
            req.locked = None
        elif nodes or req.last_node is not None:
            found = self.cache.inc_lock_ref(req.last_node)
            req.swa_uuid_for_lock, req.skip_lock_node_ids = found.swa_uuid_for_lock, found.skip_lock_node_ids
            req.swa_prefix_lock_released, req.decode_batch_idx = False, 0
            req.kv = ReqKvInfo(kv_allocated_len=0, swa_evicted_seqlen=0)
            req.locked = locked_by(req)

    def _make_virtual_room(self, pages: int) -> bool:
        window = min(pages, self.chunk // self.page + 2 * len(self.slots))
        full = max(0, pages * self.page - self.swa.full_available_size())
        swa = max(0, window * self.page - self.swa.swa_available_size())
        if full or swa:
            self.cache.evict(EvictParams(num_tokens=full, swa_num_tokens=swa))
        return self.swa.new_pages_available(pages, window)

    # -- passes --------------------------------------------------------------------------------------------------

    def _grow(self, req: Any, tokens: int) -> None:
        before, row = req.kv_committed_len or req.cache_protected_len, self.slots[req.req_pool_idx]
        if tokens == before + 1 and req not in self._prefilling:
            self._pass_on(req)
        start, end = torch.tensor([before]), torch.tensor([tokens])
        last = torch.tensor([int(row[before - 1]) if before else -1])
        if req in self._prefilling:
            slots = self.swa.alloc_extend(start, start, end, end, last, tokens - before)
        else:
            slots = self.swa.alloc_decode(end, end, last)
        assert slots is not None, f"no room for {req.rid}"
        row[before:tokens] = slots.numpy()
        req.pages = (row[: tokens : self.page] // self.page).tolist()
        req.kv_committed_len = req.kv.kv_allocated_len = tokens
        self._compute(req, before, tokens)

    def _prefill(self, entries: list[Entry]) -> None:
        self._prefilling = [entry.req for entry in entries]
        super()._prefill(entries)

    def _decode(self, reqs: list[Req]) -> None:
        self._prefilling = []
        super()._decode(reqs)

    def _pass_on(self, req: Any) -> None:
        """What SGLang's ``maybe_evict_swa`` does before a step."""
        if req.decode_batch_idx >= 1 and self.chance.random() < 0.2:
            free_swa_out_of_window_slots(
                req,
                req.kv_committed_len,
                sliding_window_size=self.window,
                page_size=self.page,
                req_to_token_pool=self.cache.req_to_token_pool,
                token_to_kv_pool_allocator=self.swa,
            )
        if (
            self.releases_early
            and not req.swa_prefix_lock_released
            and req.swa_uuid_for_lock is not None
            and req.decode_batch_idx >= self.window
        ):
            self.cache.dec_swa_lock_only(req.last_node, req.swa_uuid_for_lock, req.skip_lock_node_ids)
            req.swa_prefix_lock_released = True
            self.counts["windows let go"] += 1
        req.decode_batch_idx += 1

    def _compute(self, req: Req, start: int, end: int) -> None:
        """A pass reads what is never moved, and writes it; in the order in which passes are queued."""
        text, row = req.text.reshape(-1), self.slots[req.req_pool_idx]
        assert (self.content[row[:start]] == text[:start]).all(), f"{req.rid} reads what is another's"
        first = max(0, start - self.window + 1)
        places = self.swa.full_to_swa_index_mapping.numpy()
        seen = places[row[first:start]]
        assert (seen > 0).all(), f"{req.rid} misses a part of its window"
        assert (self.window_content[seen] == text[first:start]).all(), f"{req.rid} has a window of another"
        written = row[start:end]
        assert (places[written] > 0).all()
        self.content[written] = self.window_content[places[written]] = text[start:end]

    # -- results, and the cache ----------------------------------------------------------------------------------

    def _token(self, req: Req) -> int:
        return int(req.text.reshape(-1)[len(req.prompt) + len(req.output_ids)])

    def _cache_unfinished(self, req: Any, tokens: int) -> None:
        req.get_fill_ids = lambda: req.full_untruncated_fill_ids[:tokens]
        chunked = tokens < len(req.full_untruncated_fill_ids)
        before = list(req.pages)
        with freeing_early(self.frees_early):
            self.cache.cache_unfinished_req(req, chunked=chunked)
        req.locked = locked_by(req)
        row = self.slots[req.req_pool_idx]
        req.pages = (row[: req.kv_committed_len : self.page] // self.page).tolist()
        self.counts["pages handed over"] += sum(a != b for a, b in zip(before, req.pages, strict=True))

    def _end(self, req: Any, insert: bool) -> None:
        grouped = self.chance.random() < 0.5  # SGLang frees what a batch's requests had together
        if grouped:
            self.swa.free_group_begin()
        self.cache.cache_finished_req(req, is_insert=insert, kv_len_to_handle=req.kv_committed_len)
        if grouped:
            self.swa.free_group_end()
        self.free_rows.append(req.req_pool_idx)
        req.pages, req.req_pool_idx, req.cache_protected_len, req.kv_committed_len, req.gone = [], 0, 0, 0, True
        req.locked = req.last_node = req.kv = None

    # -- what must hold ------------------------------------------------------------------------------------------

    def check_tree(self) -> None:
        """Every page has one owner, who has it right, and every slot of both halves is counted once."""
        checkpoints = self.cache.checkpoints
        assert len(checkpoints) <= checkpoints.most
        assert checkpoints._inner.keys().isdisjoint(checkpoints._ends)
        for number in (*checkpoints._inner, *checkpoints._ends):
            assert checkpoints._has_window(self.cache.tree_core.node_by_id(number)), "a checkpoint has no window"
        page, cache, core = self.page, self.cache, self.cache.tree_core
        places = self.swa.full_to_swa_index_mapping.numpy()
        owned: list[int] = []
        windows: list[int] = []
        nodes = list(core.root_node.children.values())
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            slots, ids = node.value.numpy(), np.array(node.key.raw_token_ids(), dtype=np.float64)
            assert (self.content[slots] == ids).all(), "the tree has pages of other tokens"
            assert np.array_equal(cache.page_index.noted(node.value), slots[::page] // page), "pages of a node unknown"
            assert np.array_equal(slots_of(slots[::page] // page, page), slots)
            owned += (slots[::page] // page).tolist()
            window = node.component_data[1].value
            if window is None:
                assert not places[slots].any(), "a tombstone has a window"
            else:
                assert np.array_equal(window.numpy(), places[slots]), "the tree knows another window than the map"
                assert (self.window_content[places[slots]] == ids).all(), "the tree has the window of other tokens"
                windows += (places[slots][::page] // page).tolist()
        uncached = uncached_window = 0
        for req in self.alive:
            if req.gone:
                continue
            row, held = self.slots[req.req_pool_idx], pages_spanned(req.kv_committed_len, page)
            own = row[req.cache_protected_len : held * page : page] // page
            if req.kv_committed_len % page and len(own):
                own[-1] = row[req.kv_committed_len - 1] // page
            owned += own.tolist()
            from_ = max(req.cache_protected_len, req.kv.swa_evicted_seqlen)
            slots = row[from_ : req.kv_committed_len : page]
            assert (places[slots] > 0).all()
            windows += (places[slots] // page).tolist()
            uncached += held * page - req.cache_protected_len
            uncached_window += held * page - from_
        assert len(set(owned)) == len(owned), "a page has two owners"
        assert len(set(windows)) == len(windows), "a page of the window has two owners"
        free = self.swa.full_attn_allocator.free_pages.tolist()
        assert sorted(owned + free) == list(range(1, self.pager.ledger.virtual_pages + 1)), "a page was lost"
        free = self.swa.swa_attn_allocator.free_pages.tolist()
        assert sorted(windows + free) == list(range(1, self.swa_pages + 1)), "a page of the window was lost"
        size = self.swa.full_available_size() + cache.full_evictable_size() + cache.full_protected_size() + uncached
        assert size == self.swa.size_full, f"{size} of {self.swa.size_full} slots are counted"
        size = self.swa.swa_available_size() + cache.swa_evictable_size() + cache.swa_protected_size()
        assert size + uncached_window == self.swa.size_swa, "slots of the window are not counted"
        if not self.alive:
            cache.sanity_check()


class WholePrompts(MhaLayout):
    """As DeepSeek-V4's: prompts are whole on the device."""

    whole_prompts = True


class SwaSimulation(Simulation):
    """A server of a model with a sliding window, whose prompts read everything; every second one from the device."""

    def __init__(self, seed: int, page: int = 64):
        layout = WholePrompts if seed % 2 else MhaLayout
        super().__init__(seed, resident=0.0, page=page, scheduler=SwaScheduler, layout=layout)

    def _options(self) -> dict[str, Any] | None:
        """Without named sets, of which nothing says that a device pool has room for them."""
        options = super()._options()
        if options is not None:
            options["lsa"].pop("sets", None)
        return options
