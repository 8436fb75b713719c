"""VirtualPageAllocator: SGLang's paged allocator over virtual pages, reporting to the pager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages

from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.transfer import ids_on

NO_PAGES = np.zeros(0, dtype=np.int64)


class VirtualPageAllocator(PagedTokenToKVPoolAllocator):
    """Allocates slots of *virtual* pages; ``available_size()`` counts those and nothing else.

    The free list is kept twice, on the device for SGLang and on the host for the pager, so that nobody has to wait for
    the device to learn which pages were handed out.

    The stock allocator launches Triton kernels, which do not run on a CPU; there, torch does the same.
    """

    free_pages: torch.Tensor

    def __init__(self, size: int, page_size: int, dtype: torch.dtype, device: str, kvcache, pager: Pager):
        self.pager = pager
        super().__init__(size, page_size, dtype, device, kvcache, need_sort=False)

    def alloc(self, need_size: int):
        return self._track(lambda: super(VirtualPageAllocator, self).alloc(need_size))

    def alloc_extend(
        self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, **options
    ):
        if self.device != "cpu":
            arguments = (prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens)
            return self._track(lambda: super(VirtualPageAllocator, self).alloc_extend(*arguments, **options))

        def extend():
            pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu)
            if pages > len(self.free_pages):
                return None
            slots = torch.empty((extend_num_tokens,), dtype=torch.int64)
            alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device)
            self.free_pages = self.free_pages[pages:]
            return slots

        return self._track(extend)

    def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc):
        opens_page = seq_lens_cpu % self.page_size == 1
        if not opens_page.any():  # most steps: the slot behind the last one, without the kernel that finds pages
            slots = torch.empty_like(last_loc, dtype=torch.int64)
            return torch.add(last_loc, 1, out=slots)
        if self.device != "cpu":
            return self._track(lambda: super(VirtualPageAllocator, self).alloc_decode(seq_lens, seq_lens_cpu, last_loc))

        def decode():
            pages = int(opens_page.sum())
            if pages > len(self.free_pages):
                return None
            slots = last_loc.to(torch.int64) + 1
            slots[opens_page] = self.free_pages[:pages] * self.page_size
            self.free_pages = self.free_pages[pages:]
            return slots

        return self._track(decode)

    def clear(self):
        self.pager.reset()
        super().clear()
        self._free_on_host = np.arange(1, self.num_pages + 1, dtype=np.int64)
        self._new_pages: list[np.ndarray] = []
        self._freed_in_group: list[np.ndarray] = []
        self._in_group = False

    def take_new_pages(self) -> np.ndarray:
        """Virtual pages handed out since the last call, in the order of SGLang's batch, int64 ``[n]``."""
        if not self._new_pages:  # most steps
            return NO_PAGES
        pages, self._new_pages = self._new_pages, []
        return np.concatenate((np.zeros(0, dtype=np.int64), *pages))

    # SGLang computes on the device which pages it frees. Here they are known on the host, and go to the device's list
    # from there: both lists have the same order because one is made of the other.

    def free(self, free_index: torch.Tensor):
        if free_index.numel():
            self._free(np.unique(self.pager.page_index.pages(free_index)))

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int):
        if free_index.numel():
            self._free(self.pager.page_index.pages(free_index))

    def free_group_begin(self):
        super().free_group_begin()
        self._freed_in_group, self._in_group = [], True

    def free_group_end(self):
        super().free_group_end()
        self._in_group = False
        if self._freed_in_group:
            pages, self._freed_in_group = np.concatenate(self._freed_in_group), []
            self._release(pages)

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """Pages freed inside are still there inside: whoever held one can let go of it first."""
        if self._in_group:  # a group that ends later does the same
            yield
            return
        self.free_group_begin()
        try:
            yield
        finally:
            self.free_group_end()

    def _free(self, pages: np.ndarray):
        if self._in_group:
            self._freed_in_group.append(pages)
        else:
            self._release(pages)

    def _release(self, pages: np.ndarray):
        self.pager.ledger.release(pages)
        self.free_pages = torch.cat((ids_on(self.free_pages.device, pages), self.free_pages))
        self._free_on_host = np.concatenate((pages, self._free_on_host))

    def _track(self, allocate):
        """Run ``allocate`` and record the pages that it took off the head of the free list."""
        before = len(self.free_pages)
        slots = allocate()
        taken = before - len(self.free_pages)
        if taken:
            pages, self._free_on_host = self._free_on_host[:taken], self._free_on_host[taken:]
            self._new_pages.append(pages)
            self.pager.ledger.allocate(pages)
        return slots
