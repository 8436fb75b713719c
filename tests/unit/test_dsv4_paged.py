"""A layer of DeepSeek-V4 over pages that come and go, beside one that has all of its pages and a mask.

What attention would read is compared as bytes, entry for entry and in the same order; the pool's free pages hold NaN.
Index logits and top-k are SGLang's own, in torch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dsv4_plugin import in_order
from sglang.srt.layers.attention.dsv4.indexer import (
    fp8_paged_mqa_logits_torch,
    topk_transform_512_pytorch_vectorized,
)

from sglang_lsa.kernels.compact_table import compact_table, to_physical
from sglang_lsa.kernels.page_table import physical_slots
from sglang_lsa.kernels.retriever_score_paged import pack_pages
from sglang_lsa.memory.layout.dsv4 import ENTRIES, INDEX_ROW, KV_ROW, PAGE_TOKENS, RATIO, Dsv4Layout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.resident_table import ResidentTable

LAYER, HEADS, TOP_K = 1, 4, 512
WIDTHS = {KV_ROW: (576, 8), INDEX_ROW: (128, 4)}
"""Bytes of an entry in the two areas of a page: numbers, then scales."""
PHYSICAL, PAGES = 24, 15
"""Of the device pool, and of each of two requests: together they have more."""
select = in_order(topk_transform_512_pytorch_vectorized)


def areas(pages: torch.Tensor) -> list[torch.Tensor]:
    """Views of both areas of pages, ``[pages, ENTRIES, width]``."""
    numbers, scales = WIDTHS[pages.shape[1]]
    begins = ((0, numbers), (ENTRIES * numbers, scales))
    return [pages[:, first : first + ENTRIES * width].unflatten(1, (ENTRIES, width)) for first, width in begins]


def same(seen: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


class Requests:
    """Rows 1 and 2; the pages of a request are full but for its last one."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        virtual = 2 * PAGES + 3
        self.kv = torch.randint(0, 256, (virtual + 1, KV_ROW), dtype=torch.uint8, generator=self.draw)
        self.keys = pack_pages(torch.randn((virtual + 1, ENTRIES, 128), generator=self.draw))
        pool = [torch.full((PHYSICAL + 1, width), 0xFF, dtype=torch.uint8) for width in (KV_ROW, INDEX_ROW)]
        for part in pool:
            part[0] = 0
        self.pager = Pager(Dsv4Layout({LAYER: pool[0]}, {LAYER: pool[1]}), virtual)
        ids = 1 + self.rng.permutation(virtual)
        self.pages = {row: ids[(row - 1) * PAGES : row * PAGES] for row in (1, 2)}
        self.pager.ledger.allocate(ids)
        self.lengths = {row: PAGES * PAGE_TOKENS - int(self.rng.integers(0, PAGE_TOKENS - 1)) for row in (1, 2)}
        self.table = ResidentTable(3, PAGES, PAGE_TOKENS)
        self.req_to_token = torch.zeros((3, PAGES * PAGE_TOKENS), dtype=torch.int32)
        for row, own in self.pages.items():
            slots = own[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)
            self.req_to_token[row] = torch.from_numpy(slots.flatten())

    def prefill(self, row: int) -> None:
        """Write through slots that were translated as a pass translates them, and mirror what is full."""
        own = self.pages[row]
        assert self.pager.hold(str(row), own)
        self.pager.flush()
        tokens = torch.arange(RATIO - 1, self.lengths[row], RATIO)
        virtual = self.req_to_token[row, tokens].long() // RATIO
        slots = physical_slots(virtual, self.pager.v2p, ENTRIES)
        for piece, whole in zip(self.pager.layout.pieces, (self.kv, self.keys), strict=True):
            for to, of in zip(areas(piece.buffer), areas(whole), strict=True):
                to[slots // ENTRIES, slots % ENTRIES] = of[virtual // ENTRIES, virtual % ENTRIES]
        self.pager.store(own[: self.lengths[row] // PAGE_TOKENS])
        self.table.remap(row, np.zeros(0, dtype=np.int64), 0)

    def choose(self, row: int) -> tuple[np.ndarray, int]:
        """Read another set from now on; what it lacks is recalled, what nobody holds may go."""
        tail_start = self.lengths[row] // PAGE_TOKENS
        positions = np.sort(self.rng.permutation(tail_start)[: self.rng.integers(0, 8)])
        own = self.pages[row]
        needed = np.concatenate((own[positions], own[tail_start:]))
        assert self.pager.hold(str(row), needed)
        self.pager.retain(str(row), needed)
        self.pager.flush()
        self.table.remap(row, self.pager.ledger.v2p[own[positions]], tail_start)
        return positions, tail_start

    def poison(self) -> int:
        free = self.pager.ledger._free
        for piece in self.pager.layout.pieces:
            piece.buffer[free] = 0xFF
        return len(free)

    def read(self, rows: list[int], compact: bool, hidden: torch.Tensor | None = None) -> list[torch.Tensor]:
        """What attention reads of each request, by a new query."""
        lengths = torch.tensor([self.lengths[row] for row in rows])
        query = torch.randn((len(rows), 1, HEADS, 128), generator=self.draw.manual_seed(1)).to(torch.float8_e4m3fn)
        weights = torch.randn((len(rows), HEADS), generator=self.draw)
        if compact:
            table = torch.full((len(rows), PHYSICAL), -1, dtype=torch.int32)
            entries = torch.full((len(rows),), -1, dtype=torch.int32)
            tables = self.table.table, self.req_to_token, self.pager.v2p, torch.tensor(rows), lengths
            compact_table(*tables, PAGE_TOKENS, RATIO, table, entries)
            kv, keys = (piece.buffer for piece in self.pager.layout.pieces)
        else:
            table = torch.from_numpy(np.stack([self.pages[row] for row in rows])).int()
            entries, kv, keys = (lengths // RATIO).int(), self.kv, self.keys
        logits = fp8_paged_mqa_logits_torch(
            query,
            keys.view(-1, ENTRIES, 1, 132),
            weights,
            entries,
            table,
            None,
            table.shape[1] * ENTRIES,
            False,
        )
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        slots = torch.full((len(rows), TOP_K), -7, dtype=torch.int32)
        select(logits, entries, table, slots, ENTRIES)
        read = [of[of >= 0] for of in slots]
        return [torch.cat([area[at // ENTRIES, at % ENTRIES] for area in areas(kv)], dim=1) for at in read]

    def hidden(self, rows: list[int], sets: dict[int, tuple[np.ndarray, int]]) -> torch.Tensor:
        """Entries of pages in no set, and those that are not complete."""
        pages = torch.zeros((len(rows), PAGES), dtype=torch.bool)
        for index, row in enumerate(rows):
            positions, tail_start = sets[row]
            pages[index, positions], pages[index, tail_start:] = True, True
        lengths = torch.tensor([self.lengths[row] // RATIO for row in rows])
        return ~(pages.repeat_interleave(ENTRIES, dim=1) & (torch.arange(PAGES * ENTRIES) < lengths[:, None]))


@pytest.mark.parametrize("seed", range(3))
def test_pages_that_come_and_go_are_read_like_all_of_them(seed: int) -> None:
    requests, everything = Requests(seed), (np.arange(0), 0)
    sets: dict[int, tuple[np.ndarray, int]] = {}
    for row in (1, 2):
        requests.prefill(row)
        requests.poison()
        assert same(requests.read([row], compact=True), requests.read([row], compact=False))
        sets[row] = everything
        sets[row] = requests.choose(row)
    for step in range(6):
        row = 1 + step % 2
        sets[row] = requests.choose(row)
        requests.poison()
        requests.pager.ledger.check()
        rows = [2, 1]
        expected = requests.read(rows, compact=False, hidden=requests.hidden(rows, sets))
        assert same(requests.read(rows, compact=True), expected)
        assert [len(read) for read in expected] == [
            min(TOP_K, int((~requests.hidden([row], sets)).sum())) for row in rows
        ]
    assert requests.pager.ledger.recalls > 0


def test_a_prompt_sees_all_of_its_pages_where_they_are() -> None:
    requests = Requests(0)
    requests.prefill(1)
    table = torch.from_numpy(requests.pages[1]).int()
    to_physical(table, requests.pager.v2p)
    assert table.tolist() == requests.pager.ledger.v2p[requests.pages[1]].tolist()
    assert 0 not in table
