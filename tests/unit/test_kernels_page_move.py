"""Pages between device and host against copies one by one, over widths of words and of buffers."""

from __future__ import annotations

import pytest
import torch

from sglang_lsa.kernels.page_move import pages_from_host, pages_to_host


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


MOVES = [
    # bytes of each buffer's pages, physical -> virtual
    pytest.param([128, 128], [], [], id="0 pages"),
    pytest.param([128, 128], [3], [7], id="1 page"),
    pytest.param([2048, 2048], [1, 4], [2, 1], id="page of 64 tokens, 1 layer, 1 head"),
    pytest.param([960] * 6, [5, 1, 3], [1, 9, 2], id="head_dim 80, 3 layers"),
    pytest.param([16] * 4, [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], id="all pages"),
    pytest.param([24, 36], [5, 2], [1, 9], id="words of 4 bytes, two widths"),
    pytest.param([6, 10, 6], [5, 2], [1, 9], id="words of 2 bytes"),
    pytest.param([7, 30, 1, 8], [5, 2], [1, 9], id="single bytes, four widths"),
]


@pytest.mark.parametrize(("widths", "physical", "virtual"), MOVES)
def test_page_move(widths: list[int], physical: list[int], virtual: list[int]) -> None:
    buffers = [random_bytes(6, width, seed=number) for number, width in enumerate(widths)]
    offsets = [sum(widths[:number]) for number in range(len(widths))]
    mirror = random_bytes(10, sum(widths), seed=50)
    expected = mirror.clone()
    for p, v in zip(physical, virtual, strict=True):
        for buffer, offset in zip(buffers, offsets, strict=True):
            for byte, value in enumerate(buffer[p].tolist()):
                expected[v, offset + byte] = value
    p, v = torch.tensor(physical, dtype=torch.int64), torch.tensor(virtual, dtype=torch.int64)

    pages_to_host(buffers, offsets, p, mirror, v)
    assert torch.equal(mirror, expected)

    before = [random_bytes(6, width, seed=100 + number) for number, width in enumerate(widths)]
    after = [buffer.clone() for buffer in before]
    pages_from_host(after, offsets, p, mirror, v)
    for new, old, copied in zip(after, before, buffers, strict=True):
        for page in range(6):
            assert torch.equal(new[page], (copied if page in physical else old)[page])


def test_a_part_of_a_mirror_page_is_moved_alone() -> None:
    """One layer, or another pool's bytes beside it."""
    buffers, mirror, one = [random_bytes(4, 8, seed=1), random_bytes(4, 8, seed=2)], random_bytes(4, 40), torch.tensor
    expected = mirror.clone()
    expected[2, 8:16], expected[2, 32:40] = buffers[0][3], buffers[1][3]
    pages_to_host(buffers, [8, 32], one([3]), mirror, one([2]))
    assert torch.equal(mirror, expected)


BYTES = torch.zeros(64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("buffer", "offset", "words"),
    [
        pytest.param(BYTES[:24].view(3, 8), 9, "8 bytes at 9 do not fit into a mirror page of 16", id="end"),
        pytest.param(BYTES[:24].view(3, 8), -1, "8 bytes at -1 do not fit", id="begin"),
        pytest.param(BYTES.view(2, 32).float(), 0, r"torch.float32 .*give contiguous uint8 \[pages, byte", id="floats"),
        pytest.param(BYTES.view(4, 16)[:, :8], 0, r"strides \(16, 1\)", id="not contiguous"),
        pytest.param(BYTES[1:25].view(3, 8), 0, "at a multiple of 16", id="not aligned"),
    ],
)
@pytest.mark.parametrize("copy", [pages_to_host, pages_from_host])
def test_buffers_that_do_not_fit_are_refused(copy, buffer: torch.Tensor, offset: int, words: str) -> None:
    mirror, page = torch.zeros(3, 16, dtype=torch.uint8), torch.tensor([1])
    with pytest.raises(ValueError, match=words):
        copy([buffer], [offset], page, mirror, page)
