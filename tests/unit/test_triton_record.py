"""Recording queries: Triton against its torch reference; see ``triton_cases``."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, NAN, assert_same, ids, needs_graphs, places, random

from sglang_lsa.kernels.record import _record_triton, record_reference

# --- record ----------------------------------------------------------------------------------------------------------

RECORDS = [
    # tokens, width, ring length, slots
    pytest.param(0, 8, 4, 2, id="0 tokens"),
    pytest.param(1, 1, 1, 1, id="smallest"),
    pytest.param(1, 8, 4, 2, id="1 token"),
    pytest.param(5, 80, 8, 3, id="width 80"),
    pytest.param(8, 64, 63, 2, id="ring of 63"),
    pytest.param(9, 3 * 80, 32, 4, id="3 heads of 80"),
    pytest.param(3, 5000, 4, 2, id="wider than a block"),
]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "length", "slots"), RECORDS)
def test_record(tokens: int, width: int, length: int, slots: int, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    source = random(tokens, width, dtype=dtype)
    rows, positions = places(tokens, length, ids_dtype)
    ring = torch.full((6, length, slots, width), NAN, dtype=dtype, device=DEVICE)
    expected = ring.clone()
    record_reference(source, rows, positions, expected, slots - 1)
    _record_triton(source, rows, positions, ring, slots - 1)
    assert_same(ring, expected)
    assert int((~ring[..., 0].isnan()).sum()) == tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_record_rows_of_a_wider_tensor(dtype: torch.dtype) -> None:
    """The queries are a part of what the projection of queries, keys and values gives."""
    whole = random(7, 3 * 16, dtype=dtype)
    source = whole[:, 16:32]
    assert not source.is_contiguous()
    rows, positions = places(7, 8, torch.int64)
    ring = torch.full((6, 8, 2, 16), NAN, dtype=dtype, device=DEVICE)
    expected = ring.clone()
    record_reference(source, rows, positions, expected, 0)
    _record_triton(source, rows, positions, ring, 0)
    assert_same(ring, expected)


def test_record_every_second_row() -> None:
    source = random(8, 16)[::2]
    rows, positions = places(4, 8, torch.int64)
    ring = torch.full((6, 8, 1, 16), NAN, device=DEVICE)
    expected = ring.clone()
    record_reference(source, rows, positions, expected, 0)
    _record_triton(source, rows, positions, ring, 0)
    assert_same(ring, expected)


def test_record_converts_to_the_type_of_the_ring() -> None:
    source = random(4, 16)
    rows, positions = places(4, 8, torch.int64)
    ring = torch.full((6, 8, 1, 16), NAN, dtype=torch.float16, device=DEVICE)
    expected = ring.clone()
    record_reference(source, rows, positions, expected, 0)
    _record_triton(source, rows, positions, ring, 0)
    assert_same(ring, expected)


@pytest.mark.parametrize("length", [1, 3, 8])
def test_record_the_last_tokens_of_each_request(length: int) -> None:
    """Prompts longer, as long and shorter than the ring, beside one that decodes, and padding that shares row 0."""
    tokens = {2: 8, 1: 3, 4: 1, 5: 20, 0: 2}
    rows = ids([row for row, count in tokens.items() for _ in range(count)])
    positions = ids([100 * row + index for row, count in tokens.items() for index in range(count)])
    source = random(len(rows), 80)
    ring = torch.full((6, length, 2, 80), NAN, device=DEVICE)
    expected = ring.clone()
    for index, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        expected[row, position % length, 1] = source[index]
    for run in (_record_triton, record_reference):
        seen = ring.clone()
        run(source, rows, positions, seen, 1, True)
        assert_same(seen, expected)


@pytest.mark.parametrize(
    ("source", "ring"),
    [
        pytest.param(torch.zeros(4, 2).T, torch.zeros(3, 2, 1, 4), id="source"),
        pytest.param(torch.zeros(2, 4), torch.zeros(2, 3, 1, 4).transpose(0, 1), id="ring"),
    ],
)
def test_record_refuses_what_is_not_contiguous(source: torch.Tensor, ring: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"source strides \(.*\) or ring strides \(.*\) are not contiguous"):
        _record_triton(source, ids([1, 2]), ids([0, 0]), ring, 0)


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


@needs_graphs
def test_record_in_a_cuda_graph() -> None:
    """Replayed with other rows, positions and content, it records those."""
    source = random(5, 80)
    rows, positions = places(5, 8, torch.int64)
    ring = torch.full((6, 8, 2, 80), NAN, device=DEVICE)
    _record_triton(source, rows, positions, ring.clone(), 1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _record_triton(source, rows, positions, ring, 1)
    for step in range(3):
        source.copy_(random(5, 80, seed=step))
        positions.add_(1)
        rows.copy_(rows.roll(1))
        ring.fill_(NAN)
        expected = ring.clone()
        record_reference(source, rows, positions, expected, 1)
        graph.replay()
        assert_same(ring, expected)
