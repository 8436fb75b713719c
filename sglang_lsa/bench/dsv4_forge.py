"""Prefixes that nobody computed: in the radix tree and in the pools of a server, as if they had been prefilled.

A prompt of a million tokens takes minutes of prefill, and dozens of them are measured together. What decode takes of a
GPU's time does not depend on what its KV says, so the KV is drawn. Runs inside of the server, while it is idle; for
SGLang and for LSA alike: allocated as SGLang allocates, and found by its own search, window and all.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sglang_lsa.bench.dsv4_arms import Dsv4Arm
from sglang_lsa.memory.layout.dsv4 import PAGE_TOKENS

DRAWS = 8
"""Different pages; page numbers take turns with them."""
SMALL = 0xBF
"""Bits of a byte that leave numbers small and finite, as FP8 and as the high byte of bfloat16: below 2."""
ONE = 127
"""The scale of 1 as it is kept of 64 numbers: an exponent."""
VALUES, SCALES = 576, 8
"""Bytes of an entry and of its scales, which follow after all entries of a page."""
HOLDER = "(forge)"
AT_ONCE = 512
"""Pages of LSA that are on the device together while they are drawn."""


def drawn_entries(entries: int, row: int, seed: int) -> torch.Tensor:
    """Pages of entries, uint8 ``[DRAWS, row]``.

    Args:
        entries: of a page.
        row: bytes of a page, those that fill it up included.
    """
    pages = np.full((DRAWS, row), ONE, dtype=np.uint8)
    pages[:, : entries * VALUES] = _small((DRAWS, entries * VALUES), seed)
    return torch.from_numpy(pages)


def drawn_index_keys(entries: int, row: int, seed: int) -> torch.Tensor:
    """Pages of index keys, each with a float32 scale, uint8 ``[DRAWS, row]``."""
    values = row - 4 * entries
    pages = np.empty((DRAWS, row), dtype=np.uint8)
    pages[:, :values] = _small((DRAWS, values), seed)
    pages[:, values:] = np.ones((DRAWS, entries), dtype=np.float32).view(np.uint8)
    return torch.from_numpy(pages)


def _small(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng((6, seed)).integers(0, 256, shape, dtype=np.uint8) & SMALL


class Drawn:
    """Buffers of one kind, and the pages that go into them: ``[pages, row]`` bytes each, in the model's order."""

    def __init__(self, buffers: Sequence[torch.Tensor], pages: torch.Tensor):
        self.buffers = [buffer.view(torch.uint8) for buffer in buffers]
        self.pages = pages.to(buffers[0].device)

    def write(self, places: np.ndarray) -> None:
        """Fill these pages of all buffers; queued on the current stream."""
        for part in np.array_split(places, -(-len(places) // AT_ONCE) or 1):
            ids = torch.from_numpy(part).to(self.pages.device)
            rows = self.pages[ids % DRAWS]
            for buffer in self.buffers:
                buffer[ids] = rows


def _entries(buffers: Sequence[torch.Tensor], entries: int, seed: int) -> Drawn:
    return Drawn(buffers, drawn_entries(entries, buffers[0].shape[1], seed))


class Forge:
    """Prefixes of one server.

    Args:
        allocator: SGLang's, of pages of the context and of the window.
        tree: its radix tree.
        pool: its pool of KV of DeepSeek-V4.
        runtime: LSA's; None for SGLang without it.
    """

    def __init__(self, allocator: Any, tree: Any, pool: Any, runtime: Any = None):
        self.allocator, self.tree, self.runtime = allocator, tree, runtime
        self.window = _entries(pool.swa_kv_pool.kv_buffer, PAGE_TOKENS, 0)
        self.c128 = _entries(pool.c128_kv_pool.kv_buffer, PAGE_TOKENS // 128, 1)
        index = pool.c4_indexer_kv_pool.index_k_with_scale_buffer
        keys = drawn_index_keys(PAGE_TOKENS // 4, index[0].shape[1], 3)
        self.paged = (_entries(pool.c4_kv_pool.kv_buffer, PAGE_TOKENS // 4, 2), Drawn(index, keys))

    def prefixes(self, arm: Dsv4Arm, most: int, vocabulary: int, spare: int) -> int:
        """Forge the first prefixes of an arm; returns how many there is room for.

        Args:
            most: that are wanted.
            spare: pages that are left free for each of them, and once more; of windows, one for each.
        """
        for number in range(most):
            wanted = arm.pages + spare * (number + 2)
            if not self.allocator.new_pages_available(wanted, 2 + number) or not self._one(arm, number, vocabulary):
                return number
        return most

    def _one(self, arm: Dsv4Arm, number: int, vocabulary: int) -> bool:
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        full, swa = self.allocator.full_attn_allocator, self.allocator.swa_attn_allocator
        slots = full.alloc(arm.context)
        window = swa.alloc(PAGE_TOKENS)
        self.allocator.full_to_swa_index_mapping[slots] = 0
        self.allocator.set_full_to_swa_mapping(slots[-PAGE_TOKENS:], window)
        pages = (slots[::PAGE_TOKENS] // PAGE_TOKENS).cpu().numpy()
        self.window.write((window[::PAGE_TOKENS] // PAGE_TOKENS).cpu().numpy())
        self.c128.write(pages)
        self._write(pages)
        ids = array("q", arm.prefix(number, vocabulary).astype(np.int64).tobytes())
        params = InsertParams(key=RadixKey(ids, None), value=slots.to(torch.int64), prev_prefix_len=0)
        params.swa_evicted_seqlen = arm.context - PAGE_TOKENS
        known = self.tree.insert(params).prefix_len
        if known:
            raise RuntimeError(f"the radix tree had {known} tokens of prefix {number} already: flush it first")
        return True

    def _write(self, pages: np.ndarray) -> None:
        """Entries and index keys: in SGLang's pools, or through LSA's device pool in its mirror."""
        if self.runtime is None:
            for drawn in self.paged:
                drawn.write(pages)
            return
        pager = self.runtime.pager
        self.allocator.take_new_pages()  # they belong to no batch
        at_once = max(1, min(AT_ONCE, pager.ledger.physical_pages // 2))
        with self.runtime.on_stream():
            for part in np.array_split(pages, -(-len(pages) // at_once)):
                if not pager.hold(HOLDER, part):
                    raise RuntimeError(f"there is no room for {len(part)} pages on the device: is the server idle?")
                physical = pager.ledger.v2p[part]
                for drawn in self.paged:
                    drawn.write(physical)
                self.runtime.page_keys.complete(part, physical)
                pager.store(part)
                pager.settle()
                pager.forget(HOLDER)
            pager.flush()


def pool_bytes(pool: Any) -> Mapping[str, int]:
    """Device bytes of every part of SGLang's pool of DeepSeek-V4."""
    states = [part.kv_score_buffer.kv_score for part in _states(pool)]
    parts = {
        "c4_kv": pool.c4_kv_pool.kv_buffer,
        "c4_index": pool.c4_indexer_kv_pool.index_k_with_scale_buffer,
        "c128_kv": pool.c128_kv_pool.kv_buffer,
        "swa_kv": pool.swa_kv_pool.kv_buffer,
        "states": states,
        "swa_map": [pool.full_to_swa_index_mapping],
    }
    return {name: sum(buffer.numel() * buffer.element_size() for buffer in of) for name, of in parts.items()}


def _states(pool: Any) -> list[Any]:
    return [part for part in (*pool.compress_state_pools, *pool.indexer_compress_state_pools) if part is not None]
