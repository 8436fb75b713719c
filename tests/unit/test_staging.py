"""Staging: pages of the host mirror, block by block and layer by layer, as one forward pass reads them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from sglang_lsa.memory.copy_engine import runs
from sglang_lsa.memory.layout.base import PageShape
from sglang_lsa.memory.layout.mha import MhaLayout, mha_shape
from sglang_lsa.memory.staging import StagedPages, Staging, staging_bytes, sums_bytes

PAGE, LAYERS, HEADS, DIM, V_DIM = 4, 3, 2, 5, 3
BLOCK = 3
"""Pages in a buffer."""
MIRRORED = 12


def make_staging(block: int = BLOCK, dtype: torch.dtype = torch.float32, page: int = PAGE) -> Staging:
    """Over a mirror whose content tells page, layer and token."""
    keys, values = ([torch.zeros(page, HEADS, dim, dtype=dtype) for _ in range(LAYERS)] for dim in (DIM, V_DIM))
    layout = MhaLayout(keys, values, page)
    content = torch.randn(MIRRORED + 1, layout.page_bytes // dtype.itemsize, generator=torch.Generator().manual_seed(0))
    mirror = content.to(dtype).view(torch.uint8)
    return Staging(layout, mirror, block, lambda: pytest.fail("there is no stream on a CPU"))


def expected(staging: Staging, pages: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of these pages, one after the other."""
    layout = staging.layout
    assert isinstance(layout, MhaLayout)
    keys, values = (staging.mirror[pages, p.offset : p.offset + p.nbytes].flatten() for p in layout.by_layer[layer])
    dtype = layout.key_buffers[0].dtype
    return keys.view(dtype).view(-1, HEADS, DIM), values.view(dtype).view(-1, HEADS, V_DIM)


def copies(blocks: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks are valid until the next is asked for."""
    return [(keys.clone(), values.clone()) for keys, values in blocks]


def check_layer(staged: StagedPages, pages: list[int], layer: int) -> None:
    blocks = copies(staged.layer(layer))
    assert [len(keys) for keys, _ in blocks] == [len(values) for _, values in blocks] == staged.sizes
    for which, wanted in enumerate(expected(staged.staging, pages, layer)):
        assert torch.equal(torch.cat([wanted[:0], *(block[which] for block in blocks)]), wanted)


# --- pages that lie side by side --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        pytest.param([], (), id="none"),
        pytest.param([7], ((7, 1),), id="one page"),
        pytest.param([3, 4, 5], ((3, 3),), id="one run"),
        pytest.param([*range(9, 25), *range(2, 6)], ((9, 16), (2, 4)), id="two runs"),
        pytest.param([*range(9, 17), 40], None, id="too short a run for two calls"),
        pytest.param([5, 4, 3], None, id="the other way round"),
        pytest.param([0, 1, 2], ((0, 3),), id="from the padding page on"),
    ],
)
def test_runs_of_pages(ids: list[int], found: tuple[tuple[int, int], ...] | None) -> None:
    assert runs(np.array(ids, dtype=np.int64), 100) == found


def test_a_run_ends_where_another_call_locked_the_mirror() -> None:
    """CUDA refuses a copy of what two calls locked."""
    assert runs(np.arange(90, 310), 100) == ((90, 10), (100, 100), (200, 100), (300, 10))
    assert runs(np.arange(98, 102), 100) is None


def test_runs_name_every_page_once_and_in_order() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        parts = [np.arange(start := generator.integers(0, 10_000), start + generator.integers(8, 40)) for _ in range(5)]
        ids = np.concatenate(parts)
        found = runs(ids, 20_000)
        assert found is not None
        assert np.array_equal(np.concatenate([np.arange(first, first + count) for first, count in found]), ids)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        pytest.param((1, ((1,),)), 2 * 16, id="smallest"),
        pytest.param((256, mha_shape(64, 32, 8, 128, 128, 2).layers), 128 << 20, id="8B"),
        pytest.param((16, mha_shape(64, 5, 3, 64, 64, 4).layers), 2 * 2 * 16 * 64 * 3 * 64 * 4, id="float32"),
        pytest.param((10, ((80,), (24, 9), (100,))), 2 * 1008, id="the largest layer"),
    ],
)
def test_two_buffers_of_a_layer(arguments: tuple[int, tuple[tuple[int, ...], ...]], size: int) -> None:
    pages, layers = arguments
    assert staging_bytes(pages, PageShape(64, layers)) == size


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        pytest.param((1, 1, 1), 8, id="smallest"),
        pytest.param((8192, 32, 128), 8192 * 32 * 129 * 4, id="8B"),
        pytest.param((0, 32, 128), 0, id="no chunks"),
    ],
)
def test_sums_of_a_chunk(arguments: tuple[int, int, int], size: int) -> None:
    tokens, heads, dim = arguments
    assert sums_bytes(*arguments) == size
    out, lse = torch.zeros(tokens, heads, dim), torch.zeros(tokens, heads)
    assert size == out.numel() * 4 + lse.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, BLOCK, 20])
def test_what_is_planned_is_what_is_allocated(block: int, dtype: torch.dtype) -> None:
    staging = make_staging(block, dtype)
    assert staging.nbytes == staging_bytes(block, mha_shape(PAGE, LAYERS, HEADS, DIM, V_DIM, dtype.itemsize))
    assert staging.nbytes == staging.buffers.untyped_storage().nbytes()


# --- reading ---------------------------------------------------------------------------------------------------------


COUNTS = [
    pytest.param([], [], id="0 pages"),
    pytest.param([5], [1], id="1 page"),
    pytest.param([7, 2], [2], id="less than a block"),
    pytest.param([7, 2, 9], [3], id="a block"),
    pytest.param([7, 2, 9, 1], [3, 1], id="a block and a page"),
    pytest.param([12, 1, 11, 2, 10, 3], [3, 3], id="2 blocks"),
    pytest.param([8, 6, 4, 2, 1, 3, 5, 7], [3, 3, 2], id="2 blocks and 2 pages"),
    pytest.param(list(range(12, 0, -1)), [3, 3, 3, 3], id="all pages"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("pages", "blocks"), COUNTS)
def test_every_layer_has_the_content_of_the_mirror(pages: list[int], blocks: list[int], dtype: torch.dtype) -> None:
    staging = make_staging(dtype=dtype)
    staged = staging.read(np.array(pages, dtype=np.int64))
    assert staged.sizes == [count * PAGE for count in blocks]
    for layer in range(LAYERS):
        check_layer(staged, pages, layer)
    assert staging.staged_pages == len(pages)


@pytest.mark.parametrize("page", [16, 64, 256])
@pytest.mark.parametrize("block", [1, 2, 5, 12, 50])
def test_blocks_and_pages_of_any_size(block: int, page: int) -> None:
    staging, pages = make_staging(block, page=page), list(range(12, 0, -1))
    staged = staging.read(np.array(pages))
    for layer in range(LAYERS):
        check_layer(staged, pages, layer)


def test_a_block_stays_until_the_next_is_asked_for() -> None:
    """Attention of one block may be queued when the next is filled: consecutive ones do not share a buffer."""
    staging = make_staging(1)
    staged = staging.read(np.array([4, 8]))
    seen = []
    for layer in range(LAYERS):
        for keys, values in staged.layer(layer):
            wanted = expected(staging, [[4, 8][len(seen) % 2]], layer)
            assert torch.equal(keys, wanted[0]) and torch.equal(values, wanted[1])
            seen.append((keys.data_ptr(), values.data_ptr()))
    assert len(set(seen)) == 2
    assert all(a != b for a, b in pairwise(seen))


def test_pages_are_counted_once_for_all_layers_and_for_every_pass() -> None:
    staging = make_staging()
    for pages in ([1, 2, 3, 4], [], [4]):
        staged = staging.read(np.array(pages, dtype=np.int64))
        for layer in range(LAYERS):
            list(staged.layer(layer))
    assert staging.staged_pages == 5


# --- the order of the layers -----------------------------------------------------------------------------------------


def read_layer(staged: StagedPages, layer: int) -> None:
    list(staged.layer(layer))


def begin_layer(staged: StagedPages, layer: int) -> None:
    next(staged.layer(layer))


@pytest.mark.parametrize(
    ("before", "wrong", "due"),
    [
        pytest.param([], 1, 0, id="the second first"),
        pytest.param([], LAYERS - 1, 0, id="the last first"),
        pytest.param([0], 0, 1, id="the first again"),
        pytest.param([0], 2, 1, id="one left out"),
        pytest.param([0, 1, 2], 0, 3, id="beyond the last"),
    ],
)
def test_layers_out_of_their_order_are_an_error(before: list[int], wrong: int, due: int) -> None:
    staged = make_staging().read(np.arange(1, 6))
    for layer in before:
        read_layer(staged, layer)
    with pytest.raises(RuntimeError, match=f"layer {wrong} was asked for when {due} was next"):
        begin_layer(staged, wrong)


def test_a_layer_that_was_not_read_to_its_end_is_an_error() -> None:
    staged = make_staging().read(np.arange(1, 6))
    begin_layer(staged, 0)
    with pytest.raises(RuntimeError, match="layer 1 was asked for when 0 was next"):
        begin_layer(staged, 1)


def test_a_pass_without_pages_may_ask_for_any_layer() -> None:
    staged = make_staging().read(np.zeros(0, dtype=np.int64))
    assert [list(staged.layer(layer)) for layer in (2, 0, 0)] == [[], [], []]


@pytest.mark.parametrize("layers", [0, 1, LAYERS - 1])
def test_a_pass_given_up_half_way_does_not_disturb_the_next(layers: int) -> None:
    staging = make_staging()
    given_up = staging.read(np.array([1, 2, 3, 4, 5, 6, 7]))
    for layer in range(layers):
        read_layer(given_up, layer)
    begin_layer(given_up, layers)

    pages = [9, 8, 10, 11]
    staged = staging.read(np.array(pages))
    for layer in range(LAYERS):
        check_layer(staged, pages, layer)
