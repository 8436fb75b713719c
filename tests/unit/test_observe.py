"""observe: the ring of recent queries, and the bounds of complete pages."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.observe import PageKeys, QueryObserver, default_layers, recent_tokens
from sglang_lsa.kernels.page_table import resident_slots
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.resident_table import ResidentTable

HEADS, DIM = 2, 3
LAYERS = (1, 4)


def observer(positions: int = 8, rows: int = 4) -> QueryObserver:
    return QueryObserver(rows, positions, LAYERS, HEADS, DIM, torch.float32, "cpu")


def query(row: int, layer: int, position: int) -> torch.Tensor:
    """What row ``row`` asked at ``position`` in ``layer``: another value for each."""
    return torch.full((HEADS, DIM), float(row * 10_000 + layer * 1_000 + position))


def show(ring: QueryObserver, row: int, first: int, last: int, layers: tuple[int, ...] = (0, 1, 2, 3, 4)) -> None:
    """One forward pass over positions ``first`` to ``last - 1``; as the backend does, only the recent are shown."""
    positions = torch.arange(max(first, last - ring.positions), last)
    rows = torch.full_like(positions, row)
    for layer in layers:
        ring.observe(layer, torch.stack([query(row, layer, int(p)) for p in positions]), rows, positions)


def recent(ring: QueryObserver, row: int, first: int, length: int) -> torch.Tensor:
    """What is scored of one request: the queries of its recent positions, in no particular order."""
    request: Any = SimpleNamespace(row=row, first_observed=first, tokens=length)
    return ring.asked([request], [np.zeros(0, dtype=np.int64)]).recent(ring.buffer, 0)


def seen(ring: QueryObserver, row: int, first: int, length: int) -> list[int]:
    """Positions whose queries come back, sorted, after checking that they are complete."""
    queries = recent(ring, row, first, length)
    positions = [int(value) - row * 10_000 - LAYERS[0] * 1_000 for value in queries[:, 0, 0, 0]]
    for got, position in zip(queries, positions, strict=True):
        assert torch.equal(got, torch.stack([query(row, layer, position) for layer in LAYERS]))
    return sorted(positions)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        pytest.param([0, 5], range(5), id="shorter than the ring"),
        pytest.param([0, 8], range(8), id="as long as the ring"),
        pytest.param([0, 20], range(12, 20), id="longer than the ring"),
        pytest.param([0, 5, 11], range(3, 11), id="across chunks"),
        pytest.param([0, 64, 66, 67], range(59, 67), id="short last chunks"),
        pytest.param([0, 64, 128], range(120, 128), id="long chunks"),
    ],
)
def test_prefill_in_chunks(chunks: list[int], expected: range) -> None:
    ring = observer()
    for first, last in itertools.pairwise(chunks):
        show(ring, 2, first, last)
    assert seen(ring, 2, 0, chunks[-1]) == list(expected)


def test_decode_continues_the_ring() -> None:
    ring = observer()
    show(ring, 1, 0, 13)
    for tokens in range(14, 40):
        show(ring, 1, tokens - 1, tokens)
        assert seen(ring, 1, 0, tokens) == list(range(tokens - 8, tokens))


def test_a_prefix_that_was_not_computed_was_not_observed() -> None:
    """A radix hit skips the first positions; the ring holds another request's queries there."""
    ring = observer()
    show(ring, 1, 0, 50)
    show(ring, 1, 64, 67)
    assert seen(ring, 1, 64, 67) == [64, 65, 66]
    show(ring, 1, 67, 68)
    assert seen(ring, 1, 64, 68) == [64, 65, 66, 67]


def test_nothing_observed() -> None:
    assert recent(observer(), 1, 64, 64).shape == (0, len(LAYERS), HEADS, DIM)


def test_rows_do_not_mix() -> None:
    ring = observer()
    rows, positions = torch.tensor([1, 3, 2]), torch.tensor([20, 7, 20])
    for layer in LAYERS:
        shown = [query(r, layer, p) for r, p in zip(rows.tolist(), positions.tolist(), strict=True)]
        ring.observe(layer, torch.stack(shown), rows, positions)
    assert seen(ring, 1, 20, 21) == seen(ring, 2, 20, 21) == [20]
    assert seen(ring, 3, 7, 8) == [7]
    assert not ring.buffer[0].any()


def test_other_layers_are_ignored() -> None:
    ring = observer()
    show(ring, 1, 0, 5, layers=(0, 2, 3, 5))
    assert not ring.buffer.any()


def test_bytes_of_the_ring() -> None:
    assert observer(positions=8, rows=4).nbytes == 4 * 8 * len(LAYERS) * HEADS * DIM * 4


@pytest.mark.parametrize("lengths", [[1], [8], [20], [3, 1, 9, 8, 7, 30], [1, 1, 1], [0, 5, 0, 12]], ids=str)
@pytest.mark.parametrize("count", [1, 8])
def test_recent_tokens(lengths: list[int], count: int) -> None:
    tokens, owners = recent_tokens(lengths, count)
    expected, start = [], 0
    for owner, length in enumerate(lengths):
        expected += [(start + token, owner) for token in range(max(0, length - count), length)]
        start += length
    assert list(zip(tokens.tolist(), owners.tolist(), strict=True)) == expected
    assert tokens.dtype == owners.dtype == np.int64


# --- page keys -------------------------------------------------------------------------------------------------------


def pool(pages: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = ((pages + 1) * PAGE_SIZE, HEADS, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float32) for _ in range(6)]


def test_page_keys_are_found_by_virtual_page() -> None:
    keys = pool(4)
    remembered = PageKeys(9, MhaLayout(keys, keys, PAGE_SIZE), LAYERS)
    remembered.complete(np.array([7, 2]), np.array([1, 4]))
    found = remembered.table[[2, 7]]
    assert found.shape == (2, len(LAYERS), 2, HEADS, DIM)
    for virtual, physical in ((7, 1), (2, 4)):
        for slot, layer in enumerate(LAYERS):
            page = keys[layer][physical * PAGE_SIZE : (physical + 1) * PAGE_SIZE]
            bounds = found[[2, 7].index(virtual), slot]
            assert torch.equal(bounds[0], page.min(dim=0).values)
            assert torch.equal(bounds[1], page.max(dim=0).values)
    assert not remembered.table[[0, 1, 3, 4, 5, 6, 8, 9]].any()


def test_page_keys_outlive_the_device_copy() -> None:
    keys = pool(4)
    remembered = PageKeys(9, MhaLayout(keys, keys, PAGE_SIZE), LAYERS)
    remembered.complete(np.array([7]), np.array([1]))
    before = remembered.table[7].clone()
    assert before.any()
    keys[1].zero_()
    assert torch.equal(remembered.table[7], before)


def test_a_page_that_is_filled_again_is_remembered_anew() -> None:
    keys = pool(4)
    remembered = PageKeys(9, MhaLayout(keys, keys, PAGE_SIZE), LAYERS)
    remembered.complete(np.array([7]), np.array([1]))
    remembered.complete(np.array([7]), np.array([2]))
    fresh = PageKeys(9, MhaLayout(keys, keys, PAGE_SIZE), LAYERS)
    fresh.complete(np.array([7]), np.array([2]))
    assert torch.equal(remembered.table, fresh.table)


def test_no_page_completed() -> None:
    remembered = PageKeys(9, MhaLayout(pool(4), pool(4), PAGE_SIZE), LAYERS)
    remembered.complete(np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    assert not remembered.table.any()
    assert remembered.nbytes == 10 * len(LAYERS) * 2 * HEADS * DIM * 4


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, (0,)), (2, (0, 1)), (4, (1, 2, 3)), (16, (5, 8, 11, 14)), (30, (9, 15, 20, 26)), (32, (10, 16, 22, 28))],
)
def test_default_layers(layers: int, expected: tuple[int, ...]) -> None:
    assert default_layers(layers) == expected


# --- the table that attention reads ----------------------------------------------------------------------------------


def test_remap_changes_one_row() -> None:
    table = ResidentTable(4, 6, PAGE_SIZE)
    table.remap(2, np.array([5, 3, 9]), 7)
    table.remap(1, np.array([4]), 2)
    table.remap(2, np.array([8]), 9)
    assert table.pages[2, : int(table.count[2])].tolist() == [8]
    assert table.count.tolist() == [0, 1, 1, 0]
    assert table.tail_start.tolist() == [0, 2, 9, 0]
    assert table.table.dtype == torch.int32
    assert table.nbytes == 4 * (2 + 6) * 4


def test_remap_to_dense() -> None:
    table = ResidentTable(4, 6, PAGE_SIZE)
    table.remap(2, np.array([5, 3, 9]), 7)
    table.remap(2, np.zeros(0, dtype=np.int64), 0)
    assert (int(table.count[2]), int(table.tail_start[2])) == (0, 0)


def test_what_the_host_knows_agrees_with_the_table() -> None:
    """Whatever rows are remapped to: as many tokens as the device finds in the table."""
    rng = np.random.default_rng(0)
    table = ResidentTable(6, 12, PAGE_SIZE)
    req_to_token, v2p = torch.zeros((6, 13 * PAGE_SIZE), dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    assert table.lengths(np.arange(6), np.full(6, 70)).tolist() == [70] * 6
    for _ in range(50):
        tail = int(rng.integers(0, 13))
        physical = rng.integers(1, 100, rng.integers(0, tail + 1))
        table.remap(int(rng.integers(1, 6)), physical, tail)
        rows = rng.permutation(6)[:4]
        lengths = table.tail_start.numpy()[rows] * PAGE_SIZE + rng.integers(0, PAGE_SIZE, 4)
        slots = resident_slots(
            table.pages,
            table.count,
            table.tail_start,
            req_to_token,
            v2p,
            torch.from_numpy(rows),
            torch.from_numpy(lengths),
            PAGE_SIZE,
        )
        assert table.lengths(rows, lengths).tolist() == [len(read) for read in slots]
        expected = (table.tail_start - table.count).numpy() * PAGE_SIZE
        assert table.shortening.tolist() == expected.tolist()
        assert table.shortening[0] == 0


def test_a_full_row() -> None:
    table = ResidentTable(3, 6, PAGE_SIZE)
    table.remap(1, np.arange(1, 7), 9)
    assert table.max_pages == 6
    assert table.pages[1].tolist() == [1, 2, 3, 4, 5, 6]
    assert not table.table[2].any()
