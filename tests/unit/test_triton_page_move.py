"""Moving pages between device and mirror: Triton against its torch reference; see ``triton_cases``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from triton_cases import DEVICE, ON_GPU, assert_same, ids

from sglang_lsa.kernels.page_move import move_pages_reference, move_pages_triton, moves


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def mha(layers: int, page: int, heads: int, dim: int, v_dim: int | None = None) -> list[int]:
    """Bytes of the buffers' pages, in bfloat16."""
    return [page * heads * width * 2 for width in (dim, v_dim or dim)] * layers


MOVES = [
    # bytes of each buffer's pages, physical -> virtual
    pytest.param(mha(2, 4, 2, 8), [], [], id="0 pages"),
    pytest.param(mha(2, 4, 2, 8), [3], [7], id="1 page"),
    pytest.param(mha(1, 64, 1, 16), [1, 4], [2, 1], id="page of 64, 1 layer, 1 head"),
    pytest.param(mha(2, 63, 1, 4), [1, 4], [2, 1], id="page of 63"),
    pytest.param(mha(3, 16, 3, 80), [5, 1, 3], [1, 9, 2], id="page of 16, head_dim 80"),
    pytest.param(mha(2, 64, 3, 80), [5, 1, 3], [1, 9, 2], id="a block is not full"),
    pytest.param(mha(1, 64, 8, 128), [2, 5], [9, 1], id="several blocks"),
    pytest.param(mha(1, 256, 2, 128), [2, 5], [9, 1], id="page of 256"),
    pytest.param(mha(5, 4, 8, 4), [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], id="all pages, more work than programs"),
    pytest.param(mha(2, 64, 2, 96, 64), [5, 2], [1, 9], id="keys wider than values"),
    pytest.param([24, 36], [5, 2], [1, 9], id="words of 4 bytes"),
    pytest.param([6, 10, 6], [5, 2], [1, 9], id="words of 2 bytes"),
    pytest.param([4099, 30, 1, 8], [5, 2], [1, 9], id="single bytes, several blocks"),
]


def on_device(buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [buffer.to(DEVICE, copy=True) for buffer in buffers]


def pinned(mirror: torch.Tensor) -> torch.Tensor:
    return mirror.pin_memory() if ON_GPU else mirror.clone()


@pytest.mark.parametrize("to_host", [True, False], ids=["to host", "from host"])
@pytest.mark.parametrize(("widths", "physical", "virtual"), MOVES)
def test_move_pages(widths: list[int], physical: list[int], virtual: list[int], to_host: bool) -> None:
    pool = [random_bytes(6, width, seed=number) for number, width in enumerate(widths)]
    offsets = [sum(widths[:number]) for number in range(len(widths))]
    expected_mirror = random_bytes(10, sum(widths), seed=200)
    seen, mirror = on_device(pool), pinned(expected_mirror)
    p, v = torch.tensor(physical, dtype=torch.int64), torch.tensor(virtual, dtype=torch.int64)
    move_pages_reference(moves(pool, offsets, expected_mirror), p, expected_mirror, v, to_host=to_host)

    move_pages_triton(moves(seen, offsets, mirror), ids(physical), mirror, ids(virtual), to_host=to_host)
    synchronize()
    assert_same(mirror, expected_mirror)
    for moved, expected in zip(seen, pool, strict=True):
        assert_same(moved.cpu(), expected)


@pytest.mark.parametrize("to_host", [True, False], ids=["to host", "from host"])
@pytest.mark.parametrize("widths", [mha(3, 4, 2, 80), [40, 12, 16, 9, 7, 40]], ids=["mha", "odd"])
def test_moving_one_layer_leaves_the_others(widths: list[int], to_host: bool) -> None:
    """Layer after layer, the copy is that of all layers."""
    physical, virtual = [5, 1, 3], [1, 9, 2]
    pool = [random_bytes(6, width, seed=number) for number, width in enumerate(widths)]
    offsets = [sum(widths[:number]) for number in range(len(widths))]
    expected_mirror = random_bytes(10, sum(widths), seed=200)
    seen, mirror = on_device(pool), pinned(expected_mirror)
    p, v = torch.tensor(physical), torch.tensor(virtual)
    for layer in range(0, len(widths), 2):
        layers = slice(layer, layer + 2)
        expected = moves(pool[layers], offsets[layers], expected_mirror)
        move_pages_reference(expected, p, expected_mirror, v, to_host=to_host)
        found = moves(seen[layers], offsets[layers], mirror)
        move_pages_triton(found, ids(physical), mirror, ids(virtual), to_host=to_host)
        synchronize()
        assert_same(mirror, expected_mirror)
        for moved, still in zip(seen, pool, strict=True):
            assert_same(moved.cpu(), still)


def test_pages_of_the_usual_sizes_move_in_words_of_8_bytes_with_one_launch() -> None:
    mirror = torch.zeros(2, sum(mha(4, 64, 8, 128)), dtype=torch.uint8)
    buffers = [torch.zeros(2, width, dtype=torch.uint8) for width in mha(4, 64, 8, 128)]
    (move,) = moves(buffers, range(0, mirror.shape[1], buffers[0].shape[1]), mirror)
    assert (move.buffers[0].dtype, move.width, move.unit) == (torch.int64, 16384, 16384)
    assert move.places.tolist() == list(range(8))
