"""page_move: whole pages, as bytes, between buffers of the device and the page-contiguous host mirror.

A buffer is one piece of a page: of the device pool, where a page lies at its physical id, or of a staging buffer, where
pages lie side by side in the order in which prefill reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Words that one program moves at a time."""
PROGRAMS = 24
"""Programs of a copy: enough to fill PCIe 5; more would only keep multiprocessors from decode and attention."""
WORDS = ((8, torch.int64, tl.int64), (4, torch.int32, tl.int32), (2, torch.int16, tl.int16), (1, torch.uint8, tl.uint8))
"""Bytes of a word, widest first, and its type for torch and for Triton."""


def pages_to_host(
    buffers: Sequence[torch.Tensor],
    offsets: Sequence[int],
    physical: torch.Tensor,
    mirror: torch.Tensor,
    virtual: torch.Tensor,
) -> None:
    """Copy device pages ``physical`` into mirror pages ``virtual``.

    On a GPU the mirror must be page-locked, and the copy is asynchronous on the current stream.

    Args:
        buffers: uint8 ``[pages, bytes]`` each, contiguous, all on one device.
        offsets: where the bytes of each buffer begin in a mirror page.
        physical, virtual: int64 ``[n]`` on the device of the buffers.
        mirror: uint8 ``[virtual_pages + 1, page_bytes]`` host memory, contiguous.

    Raises:
        ValueError: buffers that do not fit, see :func:`moves`.
    """
    _move(buffers, offsets, physical, mirror, virtual, True)


def pages_from_host(
    buffers: Sequence[torch.Tensor],
    offsets: Sequence[int],
    physical: torch.Tensor,
    mirror: torch.Tensor,
    virtual: torch.Tensor,
) -> None:
    """Copy mirror pages ``virtual`` into device pages ``physical``; arguments as in :func:`pages_to_host`."""
    _move(buffers, offsets, physical, mirror, virtual, False)


def _move(buffers, offsets, physical, mirror, virtual, to_host: bool) -> None:
    prepared = moves(buffers, offsets, mirror)
    (move_pages_triton if buffers and buffers[0].is_cuda else move_pages_reference)(
        prepared, physical, mirror, virtual, to_host=to_host
    )


@dataclass(frozen=True)
class Move:
    """Buffers of one width, which one launch moves; looked up once.

    Attributes:
        buffers: words ``[pages, width]``.
        offsets: where they begin in a mirror page, in words.
        addresses: of the buffers, int64 ``[buffers]`` on their device.
        places: the offsets in units, int64 ``[buffers]`` on their device.
        unit: words that divide the width, every offset and a mirror page: so the compiler knows how addresses are
            aligned, and moves 16 bytes at a time where it can.
        word: index in :data:`WORDS`.
    """

    buffers: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]
    addresses: torch.Tensor
    places: torch.Tensor
    unit: int
    word: int

    @property
    def width(self) -> int:
        """Words of a page in one buffer."""
        return self.buffers[0].shape[1]


def moves(buffers: Sequence[torch.Tensor], offsets: Sequence[int], mirror: torch.Tensor) -> tuple[Move, ...]:
    """What it takes to move pages of these buffers, arguments as in :func:`pages_to_host`: a move for each width.

    Raises:
        ValueError: a buffer or the mirror is not contiguous bytes by page, does not begin at a multiple of 16 bytes, or
            has no room in a mirror page.
    """
    page_bytes = mirror.shape[-1]
    for tensor in (mirror, *buffers):
        if tensor.dtype != torch.uint8 or tensor.ndim != 2 or not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(
                f"pages cannot be moved to or from {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} "
                f"at {tensor.data_ptr():#x}: give contiguous uint8 [pages, bytes] that begins at a multiple of 16"
            )
    for buffer, offset in zip(buffers, offsets, strict=True):
        if not 0 <= offset <= page_bytes - buffer.shape[1]:
            raise ValueError(f"{buffer.shape[1]} bytes at {offset} do not fit into a mirror page of {page_bytes}")
    return tuple(
        _moves_of(width, [pair for pair in zip(buffers, offsets, strict=True) if pair[0].shape[1] == width], page_bytes)
        for width in dict.fromkeys(buffer.shape[1] for buffer in buffers)
    )


def _moves_of(width: int, parts: list[tuple[torch.Tensor, int]], page_bytes: int) -> Move:
    unit = math.gcd(width, page_bytes, *(offset for _, offset in parts))
    word = next(index for index, (size, *_) in enumerate(WORDS) if unit % size == 0)
    size, dtype, _ = WORDS[word]
    buffers = tuple(buffer.view(dtype) for buffer, _ in parts)
    addresses, places = (
        torch.tensor(values, dtype=torch.int64, device=buffers[0].device)
        for values in ([buffer.data_ptr() for buffer in buffers], [offset // unit for _, offset in parts])
    )
    return Move(buffers, tuple(offset // size for _, offset in parts), addresses, places, unit // size, word)


def move_pages_reference(
    prepared: Sequence[Move], physical: torch.Tensor, mirror: torch.Tensor, virtual: torch.Tensor, *, to_host: bool
) -> None:
    """:func:`pages_to_host` or :func:`pages_from_host` with buffers looked up by :func:`moves` before, all on the host.

    In numpy, which copies rows: torch's indexing copies word by word, and takes several times as long.
    """
    p, v = physical.numpy(), virtual.numpy()
    for move in prepared:
        words = mirror.view(WORDS[move.word][1]).numpy()
        for buffer, offset in zip(move.buffers, move.offsets, strict=True):
            part, pool = words[:, offset : offset + move.width], buffer.numpy()
            if to_host:
                part[v] = pool[p]
            else:
                pool[p] = part[v]


def move_pages_triton(
    prepared: Sequence[Move], physical: torch.Tensor, mirror: torch.Tensor, virtual: torch.Tensor, *, to_host: bool
) -> None:
    """The same on a GPU: one launch for each width."""
    if not len(physical):
        return
    for move in prepared:
        size, _, word = WORDS[move.word]
        blocks, count = triton.cdiv(move.width, BLOCK), len(move.buffers)
        _move_pages_kernel[(min(PROGRAMS, len(physical) * count * blocks),)](
            move.addresses,
            move.places,
            mirror.data_ptr(),
            physical,
            virtual,
            len(physical),
            count,
            STRIDE=mirror.shape[1] // size // move.unit,
            UNIT=move.unit,
            WIDTH=move.width,
            BLOCKS=blocks,
            BLOCK=BLOCK,
            WORD=word,
            TO_HOST=to_host,
            num_warps=16,
        )


@triton.jit(
    do_not_specialize=["n", "count"],
    do_not_specialize_on_alignment=["addresses", "places", "physical", "virtual"],
)
def _move_pages_kernel(
    addresses,  # int64 [count] of the device buffers
    places,  # int64 [count] where they begin in a mirror page, in units
    mirror,  # address of the host mirror
    physical,  # int64 [n]
    virtual,  # int64 [n]
    n,
    count,  # buffers to copy
    STRIDE: tl.constexpr,  # units of a mirror page
    UNIT: tl.constexpr,  # words
    WIDTH: tl.constexpr,  # words of a page in one buffer, a multiple of UNIT
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WORD: tl.constexpr,  # type of a word
    TO_HOST: tl.constexpr,
):
    # Few programs walk over all (page, buffer, block): the bus is the limit, and the rest of the chip is computing.
    for work in range(tl.program_id(0), n * count * BLOCKS, tl.num_programs(0)):
        index = work // (count * BLOCKS)
        buffer = work // BLOCKS % count
        word = work % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        inside = word < WIDTH
        p = tl.load(physical + index)
        v = tl.load(virtual + index)
        # Buffers begin at multiples of 16 bytes, see moves(); the compiler cannot know that of a loaded address.
        base = tl.multiple_of(tl.load(addresses + buffer).to(tl.pointer_type(WORD)), 16)
        device = base + p * WIDTH + word
        unit = v * STRIDE + tl.load(places + buffer)
        # Small addresses come as 32 bits.
        host = tl.multiple_of(mirror.to(tl.int64).to(tl.pointer_type(WORD)), 16) + unit * UNIT + word
        if TO_HOST:
            tl.store(host, tl.load(device, mask=inside), mask=inside)
        else:
            tl.store(device, tl.load(host, mask=inside), mask=inside)
