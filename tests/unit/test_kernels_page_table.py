"""Slots and indices of what is read against naive loops, over tables, types and page sizes."""

from __future__ import annotations

import pytest
import torch

from sglang_lsa.kernels.page_table import decode_indices, decode_pages, physical_slots, resident_slots

PAGE = 4


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_physical_slots(dtype: torch.dtype) -> None:
    v2p = torch.tensor([0, 3, 0, 1, 2])
    virtual = torch.tensor([[0, 3, 4, 7], [12, 15, 16, 18]], dtype=dtype)
    slots = physical_slots(virtual, v2p, PAGE)
    assert slots.dtype == torch.int64
    assert slots.tolist() == [[0, 3, 12, 15], [4, 7, 8, 10]]
    assert physical_slots(virtual[:0], v2p, PAGE).shape == (0, 4)


def test_physical_slots_beyond_int32() -> None:
    v2p = torch.zeros(3, dtype=torch.int64)
    v2p[2] = 2**40
    assert physical_slots(torch.tensor([9], dtype=torch.int32), v2p, PAGE).tolist() == [2**40 * 4 + 1]


ROWS = [
    # resident pages (positions of the request), tail_start, tokens
    pytest.param([], 0, 1, id="dense, 1 token"),
    pytest.param([], 0, 23, id="dense"),
    pytest.param([0, 2, 3], 5, 23, id="resident and tail"),
    pytest.param([0, 2, 3], 5, 20, id="tail begins with the next token"),
    pytest.param([0, 4], 5, 21, id="tail of 1 token"),
    pytest.param([1], 2, 23, id="tail of several pages"),
    pytest.param([0, 1, 2, 3, 4], 5, 24, id="all"),
]


@pytest.mark.parametrize(("positions", "tail_start", "tokens"), ROWS)
def test_resident_slots(positions: list[int], tail_start: int, tokens: int) -> None:
    virtual_pages = [9, 2, 7, 4, 1, 5]
    v2p = torch.tensor([0, 6, 11, 0, 3, 8, 0, 1, 0, 4, 0])
    req_to_token = torch.full((4, 40), -1, dtype=torch.int32)
    for token in range(24):
        req_to_token[2, token] = virtual_pages[token // PAGE] * PAGE + token % PAGE
    pages = torch.full((4, 8), -1)
    for place, position in enumerate(positions):
        pages[2, place] = v2p[virtual_pages[position]]
    count, start = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    count[2], start[2] = len(positions), tail_start

    read = [token for token in range(tokens) if token // PAGE in positions or token // PAGE >= tail_start]
    expected = [int(v2p[virtual_pages[token // PAGE]]) * PAGE + token % PAGE for token in read]

    # Beside it in the batch: another row, dense, and the padding row, whose slots are the padding page's.
    req_to_token[3, :2] = torch.tensor([4 * PAGE, 4 * PAGE + 1])
    req_to_token[0] = 0
    rows, lengths = torch.tensor([3, 2, 0]), torch.tensor([2, tokens, 1])
    result = resident_slots(pages, count, start, req_to_token, v2p, rows, lengths, PAGE)
    assert [slots.tolist() for slots in result] == [[12, 13], expected, [0]]
    assert all(slots.dtype == torch.int64 for slots in result)


def test_resident_slots_of_an_empty_batch() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    table = torch.zeros((2, 3), dtype=torch.int64)
    assert resident_slots(table, table[:, 0], table[:, 0], table, none, none, none, PAGE) == []


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_decode_indices(table_dtype: torch.dtype) -> None:
    """The slots of :func:`resident_slots`, one request after the other, and nothing behind them."""
    req_to_token = torch.arange(3 * 20, dtype=torch.int32).view(3, 20) + 4
    v2p = torch.randperm(16, generator=torch.Generator().manual_seed(0)).int()
    table = torch.tensor([[0, 0, -1, -1], [2, 4, 9, 3], [0, 0, -1, -1]], dtype=table_dtype)
    rows, lengths = torch.tensor([2, 1, 0]), torch.tensor([7, 18, 1])
    indptr, indices = torch.full((6,), -1, dtype=torch.int32), torch.full((30,), -1, dtype=torch.int32)
    decode_indices(table, req_to_token, v2p, rows, lengths, PAGE, indptr, indices)
    assert indptr.tolist() == [0, 7, 7 + 8 + 2, 18, -1, -1]
    slots = resident_slots(table[:, 2:], table[:, 0], table[:, 1], req_to_token, v2p, rows, lengths, PAGE)
    assert indices.tolist() == [*torch.cat(slots).tolist(), *[-1] * 12]
    assert indices[7:15].tolist() == [36, 37, 38, 39, 12, 13, 14, 15]


@pytest.mark.parametrize("page", [1, 4, 16])
def test_decode_pages_hold_the_slots_that_are_read(page: int) -> None:
    """Page by page what :func:`resident_slots` names, and nothing behind it."""
    context = page * 5
    req_to_token = torch.arange(3 * context, dtype=torch.int32).view(3, context) + page
    v2p = torch.randperm(16, generator=torch.Generator().manual_seed(0)).int()
    table = torch.tensor([[0, 0, -1, -1], [2, 4, 9, 3], [0, 0, -1, -1]], dtype=torch.int32)
    rows, lengths = torch.tensor([2, 1, 0]), torch.tensor([page + 1, context - page // 2, 1])
    pages, read = torch.full((4, 6), -1, dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)
    decode_pages(table, req_to_token, v2p, rows, lengths, page, pages, read)
    slots = resident_slots(table[:, 2:], table[:, 0], table[:, 1], req_to_token, v2p, rows, lengths, page)
    assert read.tolist() == [*(len(found) for found in slots), -1]
    for found, row in zip(slots, pages, strict=False):
        count = -(-len(found) // page)
        seen = (row[:count, None].long() * page + torch.arange(page)).flatten()[: len(found)]
        assert torch.equal(seen, found)
        assert (row[count:] == -1).all()
    assert (pages[3] == -1).all()


def test_decode_pages_of_an_empty_batch() -> None:
    none, table = torch.zeros(0, dtype=torch.int64), torch.zeros((2, 3), dtype=torch.int32)
    pages, read = torch.full((1, 1), -1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    decode_pages(table, table, none, none, none, PAGE, pages, read)
    assert (pages.item(), read.item()) == (-1, -1)


def test_decode_indices_of_an_empty_batch() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    table, indptr = torch.zeros((2, 3), dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    decode_indices(table, table, none, none, none, PAGE, indptr, torch.zeros(0, dtype=torch.int32))
    assert indptr.tolist() == [0]
