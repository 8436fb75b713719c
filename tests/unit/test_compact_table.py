"""A compact page table selects what a mask over the whole table would, by SGLang's own index logits and top-k."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.attention.dsv4.indexer import (
    fp8_paged_mqa_logits_torch,
    topk_transform_512_pytorch_vectorized,
)

from sglang_lsa.kernels.compact_table import compact_table, to_physical

PAGE, RATIO, TOP_K, HEADS, DIM = 256, 4, 512, 8, 128
ENTRIES = PAGE // RATIO
VIRTUAL = 60


class World:
    """Index keys of ``VIRTUAL`` pages, scattered over a device pool, and requests that own some of them."""

    def __init__(self, lengths: list[int], seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths)
        self.width = max(-(-length // PAGE) for length in lengths)
        self.v2p = torch.zeros(VIRTUAL + 1, dtype=torch.int32)
        self.v2p[1:] = 1 + torch.randperm(VIRTUAL, generator=draw).int()
        owned = 1 + torch.randperm(VIRTUAL, generator=draw)
        assert len(lengths) * self.width <= VIRTUAL
        self.pages = owned[: len(lengths) * self.width].view(len(lengths), self.width)
        offsets = torch.arange(PAGE)
        self.req_to_token = torch.zeros((len(lengths) + 1, self.width * PAGE), dtype=torch.int32)
        self.req_to_token[1:] = (self.pages[:, :, None] * PAGE + offsets).flatten(1).int()
        values = torch.randn((VIRTUAL + 1, ENTRIES * DIM), generator=draw).to(torch.float8_e4m3fn).view(torch.uint8)
        scales = torch.rand((VIRTUAL + 1, ENTRIES), generator=draw) + 0.5
        self.keys = torch.cat((values, scales.view(torch.uint8)), dim=1).view(VIRTUAL + 1, ENTRIES, 1, DIM + 4)
        self.queries = torch.randn((len(lengths), 1, HEADS, DIM), generator=draw).to(torch.float8_e4m3fn)
        self.weights = torch.randn((len(lengths), HEADS), generator=draw)

    def logits(self, table: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        width = table.shape[1] * ENTRIES
        return fp8_paged_mqa_logits_torch(self.queries, self.keys, self.weights, entries, table, None, width, False)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Physical page table and entries of requests that read everything."""
        table = self.pages.int()
        to_physical(table, self.v2p)
        return table, (self.lengths // RATIO).int()

    def compact(self, sets: list[list[int]], tail_starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of requests that read these of their pages, in this order, and those from ``tail_start`` on."""
        resident = torch.zeros((len(sets) + 1, 2 + self.width), dtype=torch.int32)
        for row, (positions, tail_start) in enumerate(zip(sets, tail_starts, strict=True), start=1):
            resident[row, 0], resident[row, 1] = len(positions), tail_start
            resident[row, 2 : 2 + len(positions)] = self.v2p[self.pages[row - 1, positions]]
        table = torch.full((len(sets), self.width), -1, dtype=torch.int32)
        entries = torch.full((len(sets),), -1, dtype=torch.int32)
        rows = torch.arange(1, len(sets) + 1)
        compact_table(resident, self.req_to_token, self.v2p, rows, self.lengths, PAGE, RATIO, table, entries)
        return table, entries


def selected(logits: torch.Tensor, entries: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Slots that attention reads, ``[requests, TOP_K]``, -1 for none."""
    found = torch.full((len(logits), TOP_K), -7, dtype=torch.int32)
    topk_transform_512_pytorch_vectorized(logits, entries, table, found, ENTRIES)
    return found


def visible(world: World, sets: list[list[int]], tail_starts: list[int]) -> torch.Tensor:
    """Which entries each request may read, ``[requests, width * ENTRIES]``."""
    mask = torch.zeros((len(sets), world.width), dtype=torch.bool)
    for row, (positions, tail_start) in enumerate(zip(sets, tail_starts, strict=True)):
        mask[row, positions] = True
        mask[row, tail_start:] = True
    whole = torch.arange(world.width * ENTRIES) < world.lengths[:, None] // RATIO
    return mask.repeat_interleave(ENTRIES, dim=1) & whole


SETS = [
    # lengths, resident positions, tail_start
    pytest.param([255], [[]], [0], id="first page not full"),
    pytest.param([3], [[]], [0], id="no entry"),
    pytest.param([17 * PAGE + 201], [[0, 3, 4, 9, 11, 12, 13, 15]], [16], id="more than 512 resident entries"),
    pytest.param([17 * PAGE + 201], [[9, 0, 3]], [16], id="fewer than 512, in no order"),
    pytest.param([12 * PAGE], [[2, 5]], [12], id="no tail"),
    pytest.param([12 * PAGE + 1, 12 * PAGE + 3, 12 * PAGE + 4], [[2, 5]] * 3, [12] * 3, id="tail of 1, 3, 4 tokens"),
    pytest.param([9 * PAGE + 7, 14 * PAGE + 130, 600], [[*range(9)], [0, 2, 4, 6, 8, 9, 10, 11, 12], []], [9, 13, 0]),
]


@pytest.mark.parametrize(("lengths", "sets", "tail_starts"), SETS)
def test_compaction_is_masking(lengths: list[int], sets: list[list[int]], tail_starts: list[int]) -> None:
    world = World(lengths)
    table, entries = world.compact(sets, tail_starts)
    mask = visible(world, sets, tail_starts)
    assert entries.tolist() == mask.sum(1).tolist()
    seen = selected(world.logits(table, entries), entries, table)

    whole, all_entries = world.whole()
    logits = world.logits(whole, all_entries)
    for row, found in enumerate(seen):
        slots = (whole[row][:, None].long() * ENTRIES + torch.arange(ENTRIES)).flatten()
        masked = torch.where(mask[row], logits[row], -torch.inf)
        best = masked.topk(min(TOP_K, int(mask[row].sum()))).indices
        assert sorted(found[found >= 0].tolist()) == sorted(slots[best].tolist())


@pytest.mark.parametrize("tail_start", [0, 7, 17])
def test_everything_resident_is_stock_to_the_bit(tail_start: int) -> None:
    world = World([17 * PAGE + 201, 17 * PAGE + 9, 18 * PAGE])
    table, entries = world.compact([[*range(tail_start)]] * 3, [tail_start] * 3)
    whole, all_entries = world.whole()
    assert torch.equal(entries, all_entries)
    assert torch.equal(table, whole)
    logits = world.logits(table, entries)
    assert torch.equal(logits, world.logits(whole, all_entries))
    assert torch.equal(selected(logits, entries, table), selected(logits, all_entries, whole))


def test_what_is_no_page_becomes_the_padding_page() -> None:
    """SGLang's table keeps stale slots beyond a request's length; the map says so of pages that left the device."""
    pages = torch.tensor([[1, 5, -1], [2, 99, 0]], dtype=torch.int32)
    to_physical(pages, torch.tensor([0, 4, 0, 2, 1, 3], dtype=torch.int32))
    assert pages.tolist() == [[4, 3, 0], [0, 0, 0]]
