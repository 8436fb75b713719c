"""Page tables and indices of a decode step: Triton against its torch references; see ``triton_cases``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from triton_cases import DEVICE, assert_same, crossed, ids, needs_graphs, some

from sglang_lsa.kernels.compact_table import (
    _compact_table_triton,
    _to_physical_triton,
    compact_table_reference,
    to_physical_reference,
)
from sglang_lsa.kernels.page_table import (
    _decode_indices_triton,
    _decode_pages_triton,
    _physical_slots_triton,
    decode_indices_reference,
    decode_pages_reference,
    physical_slots_reference,
)

# --- page_table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (1024,), (2500,)], ids=str)
def test_physical_slots(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    v2p = ids([0, *some(29, 29)], torch.int32)
    virtual = torch.randint(0, 30 * 63, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    slots = _physical_slots_triton(virtual, v2p, 63)
    assert slots.dtype == torch.int64
    assert_same(slots, physical_slots_reference(virtual, v2p, 63))


def test_physical_slots_of_a_slice() -> None:
    v2p, virtual = ids([0, 3, 1, 2], torch.int32), ids(range(16)).view(4, 4)
    assert_same(_physical_slots_triton(virtual[:, 1], v2p, 4), physical_slots_reference(virtual[:, 1], v2p, 4))


def test_physical_slots_beyond_int32() -> None:
    v2p = ids([0, 2**31 - 1], torch.int32)
    assert _physical_slots_triton(ids([70], torch.int32), v2p, 64).tolist() == [(2**31 - 1) * 64 + 6]


Row = tuple[int, int, int]
"""Resident pages, page where the tail starts, tokens."""
BATCHES = [
    pytest.param(64, [(0, 0, 1)], id="1 token"),
    pytest.param(64, [(0, 0, 64 * 9 + 3)], id="dense"),
    pytest.param(64, [(3, 9, 64 * 9 + 3)], id="resident and tail"),
    pytest.param(64, [(3, 9, 64 * 9)], id="no tail"),
    pytest.param(63, [(2, 5, 63 * 7 + 1), (0, 0, 63)], id="page of 63"),
    pytest.param(4, [(4, 7, 30), (0, 0, 5), (1, 2, 9), (0, 0, 1), (7, 7, 28)], id="5 requests"),
    pytest.param(64, [(20, 38, 64 * 40), (0, 0, 64 * 40), (39, 39, 64 * 39 + 1)], id="many pages"),
    pytest.param(4, [(index % 3, 3, 12 + index % 5) for index in range(33)], id="33 requests"),
]
KINDS = [
    pytest.param(torch.int32, 0, id="int32"),
    pytest.param(torch.int64, 3, id="int64 and padding rows"),
]


class Batch:
    """A random table of resident pages, request table and page map, and the requests of one batch in them."""

    def __init__(self, page: int, batch: Sequence[Row], dtype: torch.dtype, padding: int) -> None:
        generator = torch.Generator().manual_seed(len(batch))
        longest = max(tokens for _, _, tokens in batch)
        spanned = -(-longest // page)
        count = len(batch)
        virtual = 1 + torch.randperm(count * spanned, generator=generator)
        tokens = torch.arange(spanned * page)
        self.page = page
        self.req_to_token = torch.full((count + 2, spanned * page), -1, dtype=torch.int32)
        self.req_to_token[0] = 0
        self.table = torch.full((count + 2, 2 + spanned), -1, dtype=torch.int32)
        self.table[0, :2] = 0
        self.v2p = torch.zeros(count * spanned + 1, dtype=torch.int32)
        self.v2p[1:] = 1 + torch.randperm(count * spanned, generator=generator).int()
        rows = (1 + torch.randperm(count + 1, generator=generator))[:count].tolist()
        for index, (row, (resident, tail, length)) in enumerate(zip(rows, batch, strict=True)):
            pages = virtual[index * spanned : (index + 1) * spanned]
            self.req_to_token[row, :length] = (pages[tokens // page] * page + tokens % page)[:length].int()
            kept = pages[torch.randperm(max(tail, 1), generator=generator)[:resident]]
            self.table[row, 0], self.table[row, 1] = resident, tail
            self.table[row, 2 : 2 + resident] = self.v2p[kept]
        self.rows = torch.tensor(rows + [0] * padding, dtype=dtype)
        self.seq_lens = torch.tensor([length for _, _, length in batch] + [1] * padding, dtype=dtype)
        reads = [(resident - tail) * page + length for resident, tail, length in batch] + [1] * padding
        self.total = sum(reads)
        self.lengths = reads
        for name in ("req_to_token", "table", "v2p", "rows", "seq_lens"):
            setattr(self, name, getattr(self, name).to(DEVICE))

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        indptr = torch.full((len(self.rows) + 3,), -1, dtype=torch.int32, device=DEVICE)
        return indptr, torch.full((self.total + 9,), -1, dtype=torch.int32, device=DEVICE)

    def run(self, function, indptr: torch.Tensor, indices: torch.Tensor) -> None:
        function(self.table, self.req_to_token, self.v2p, self.rows, self.seq_lens, self.page, indptr, indices)


@pytest.mark.parametrize(
    ("page", "rows", "dtype", "padding"), crossed(BATCHES, KINDS, edges=("1 token", "page of 63", "33 requests"))
)
def test_decode_indices(page: int, rows: Sequence[Row], padding: int, dtype: torch.dtype) -> None:
    batch = Batch(page, rows, dtype, padding)
    indptr, indices = batch.outputs()
    expected_indptr, expected = batch.outputs()
    batch.run(decode_indices_reference, expected_indptr, expected)
    batch.run(_decode_indices_triton, indptr, indices)
    assert_same(indptr, expected_indptr)
    assert_same(indices, expected)
    assert indptr[: len(batch.rows) + 1].diff().tolist() == batch.lengths
    assert indptr[len(batch.rows) + 1 :].tolist() == [-1, -1]
    assert indices[batch.total :].tolist() == [-1] * 9
    assert bool((indices[: batch.total] >= 0).all())


@pytest.mark.parametrize(
    ("dtype", "padding"), [(torch.int32, 0), (torch.int64, 3)], ids=["int32", "int64 and padding rows"]
)
@pytest.mark.parametrize(("page", "rows"), BATCHES)
def test_decode_pages(page: int, rows: Sequence[Row], padding: int, dtype: torch.dtype) -> None:
    batch = Batch(page, rows, dtype, padding)

    def run(function) -> tuple[torch.Tensor, torch.Tensor]:
        shape = len(batch.rows) + 1, max(-(-length // page) for length in batch.lengths) + 1
        pages = torch.full(shape, -1, dtype=torch.int32, device=DEVICE)
        lengths = torch.full((len(batch.rows) + 1,), -1, dtype=torch.int32, device=DEVICE)
        batch.run(function, pages, lengths)
        return pages, lengths

    (pages, lengths), (expected, expected_lengths) = run(_decode_pages_triton), run(decode_pages_reference)
    assert_same(pages, expected)
    assert_same(lengths, expected_lengths)
    assert lengths.tolist() == [*batch.lengths, -1]
    assert [int((row >= 0).sum()) for row in pages] == [*(-(-length // page) for length in batch.lengths), 0]


@pytest.mark.parametrize(
    ("dtype", "padding"), [(torch.int32, 0), (torch.int64, 3)], ids=["int32", "int64 and padding rows"]
)
@pytest.mark.parametrize("beyond", [0, 300], ids=["narrow", "wide"])
@pytest.mark.parametrize(("page", "rows"), [row for row in BATCHES if row.values[0] % 4 == 0])
def test_compact_table(page: int, rows: Sequence[Row], beyond: int, padding: int, dtype: torch.dtype) -> None:
    batch = Batch(page, rows, dtype, padding)
    width = max(-(-length // page) for length in batch.lengths) + beyond

    def run(function) -> tuple[torch.Tensor, torch.Tensor]:
        pages = torch.full((len(batch.rows), width), -1, dtype=torch.int32, device=DEVICE)
        entries = torch.full((len(batch.rows),), -1, dtype=torch.int32, device=DEVICE)
        tables = batch.table, batch.req_to_token, batch.v2p, batch.rows, batch.seq_lens
        function(*tables, page, 4, pages, entries)
        return pages, entries

    (pages, entries), (expected, expected_entries) = run(_compact_table_triton), run(compact_table_reference)
    assert_same(pages, expected)
    assert_same(entries, expected_entries)
    assert entries.tolist() == [length // 4 for length in batch.lengths]
    real = len(rows)
    assert [int((row > 0).sum()) for row in pages[:real]] == [-(-length // page) for length in batch.lengths[:real]]
    assert bool((pages[real:] == 0).all()), "padding rows read the padding page"


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 1025)], ids=str)
def test_to_physical(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    pages = torch.randint(-2, 22, shape, generator=generator, dtype=torch.int32).to(DEVICE)
    v2p = torch.tensor([0, *range(19, 0, -1)], dtype=torch.int32, device=DEVICE)
    expected = pages.clone()
    to_physical_reference(expected, v2p)
    assert_same(expected, torch.where((pages > 0) & (pages < 20), 20 - pages, 0))
    _to_physical_triton(pages, v2p)
    assert_same(pages, expected)


def test_decode_indices_of_an_empty_batch() -> None:
    batch = Batch(4, [(0, 0, 5)], torch.int64, 0)
    batch.rows, batch.seq_lens = batch.rows[:0], batch.seq_lens[:0]
    indptr, indices = batch.outputs()
    batch.run(_decode_indices_triton, indptr, indices)
    assert indices.tolist() == [-1] * len(indices)


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


@needs_graphs
def test_decode_indices_in_a_cuda_graph() -> None:
    """Replayed with another table and other lengths, it writes what they say."""
    batch = Batch(64, [(3, 9, 64 * 9 + 3), (0, 0, 64 * 4), (2, 5, 64 * 9 + 3)], torch.int64, 2)
    indptr, _ = batch.outputs()
    indices = torch.full((1000,), -1, dtype=torch.int32, device=DEVICE)
    batch.run(_decode_indices_triton, indptr, indices)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.run(_decode_indices_triton, indptr, indices)
    first = int(batch.rows[0])
    for shorter, resident in ((0, 3), (5, 2), (67, 1)):
        batch.seq_lens[0] = 64 * 9 + 3 - shorter
        batch.table[first, 0] = resident
        batch.table[first, 1] = 8
        expected_indptr, expected = torch.full_like(indptr, -1), torch.full_like(indices, -1)
        batch.run(decode_indices_reference, expected_indptr, expected)
        indptr.fill_(-1)
        indices.fill_(-1)
        graph.replay()
        assert_same(indptr, expected_indptr)
        assert_same(indices, expected)
