"""LsaSwaAllocator: SGLang's allocator for models with a sliding window, its full half over virtual pages."""

from __future__ import annotations

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from sglang_lsa.memory.pager import Pager
from sglang_lsa.radix_ext.allocator import VirtualPageAllocator


class LsaSwaAllocator(SWATokenToKVPoolAllocator):
    """Slots of full attention are those of *virtual* pages; slots of the window stay SGLang's.

    ``available_size()`` is the smaller half, as in SGLang; it never counts device pages.

    Args:
        size: slots of full attention.
        size_swa: slots of the sliding window.
        page_size: tokens of a page of both halves; that of ``pager``.
    """

    full_attn_allocator: VirtualPageAllocator
    free_group: list[torch.Tensor]

    def __init__(
        self,
        size: int,
        size_swa: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        kvcache,
        pager: Pager,
    ):
        if page_size != pager.page:
            raise ValueError(f"slots come in pages of {page_size} tokens, KV in pages of {pager.page}: use the same")
        super().__init__(size, size_swa, page_size, dtype, device, kvcache, need_sort=False)
        # It takes the place of the one that SGLang has just made, which handed nothing out.
        full_pool = getattr(kvcache, "full_kv_pool", None)
        self.full_attn_allocator = VirtualPageAllocator(size, page_size, dtype, device, full_pool, pager)

    @property
    def pager(self) -> Pager:
        return self.full_attn_allocator.pager

    def take_new_pages(self) -> np.ndarray:
        """Virtual pages handed out since the last call, see :meth:`VirtualPageAllocator.take_new_pages`."""
        return self.full_attn_allocator.take_new_pages()

    def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc):
        """All or nothing; SGLang's own loses the pages of one half where the other has none."""
        opened = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        if not self.new_pages_available(opened, opened):
            return None
        return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)

    # In a group SGLang keeps slots of the table until the group ends. Which pages they are is only known on the host
    # while the request is: so the full half is told at once, and keeps pages for its own group.

    def free(self, free_index: torch.Tensor):
        if free_index.numel():
            self.full_attn_allocator.free(free_index)
            self._free_window(free_index)

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int):
        if free_index.numel():
            self.full_attn_allocator.free_segment(free_index, start_pos=start_pos)
            self._free_window(free_index)

    def _free_window(self, free_index: torch.Tensor):
        if self.is_not_in_free_group:
            self.free_swa(free_index)
        else:
            self.free_group.append(free_index.to(torch.int64))

    def free_group_begin(self):
        super().free_group_begin()
        self.full_attn_allocator.free_group_begin()

    def free_group_end(self):
        self.is_not_in_free_group = True
        slots, self.free_group = self.free_group, []
        if slots:
            self.free_swa(torch.cat(slots))
        self.full_attn_allocator.free_group_end()
