"""record: put the rows of a forward pass into a ring buffer per request; recorded in decode CUDA graphs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def record(
    source: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    ring: torch.Tensor,
    slot: int,
    last: bool = False,
) -> None:
    """``ring[rows[i], positions[i] % ring.shape[1], slot] = source[i]`` for every token ``i``.

    Args:
        source: ``[tokens, width]``; the last dimension contiguous.
        rows: ``[tokens]`` request row of each token.
        positions: ``[tokens]`` absolute position of each token; no two tokens may share a place.
        ring: ``[requests + 1, positions, slots, width]``, contiguous, output.
        slot: which observed layer this is.
        last: a request may have more tokens than the ring has positions, which follow each other then; the last ones
            are recorded.
    """
    (_record_triton if ring.is_cuda else record_reference)(source, rows, positions, ring, slot, last)


def record_reference(source, rows, positions, ring, slot, last=False) -> None:
    """See :func:`record`."""
    length = ring.shape[1]
    if last and len(rows) > length:
        kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        kept[:-length] = rows[:-length] != rows[length:]
        source, rows, positions = source[kept], rows[kept], positions[kept]
    ring[rows.long(), positions.long() % length, slot] = source.to(ring.dtype)


def _record_triton(source, rows, positions, ring, slot, last=False) -> None:
    tokens, width = source.shape
    if source.stride(1) != 1 or not ring.is_contiguous():
        raise ValueError(f"source strides {source.stride()} or ring strides {ring.stride()} are not contiguous")
    if tokens:
        _record_kernel[(tokens,)](
            source,
            rows,
            positions,
            ring,
            slot,
            source.stride(0),
            LENGTH=ring.shape[1],
            SLOTS=ring.shape[2],
            WIDTH=width,
            BLOCK=min(4096, triton.next_power_of_2(width)),
            LAST=last,
        )


@triton.jit(do_not_specialize=["slot"], do_not_specialize_on_alignment=["rows", "positions"])
def _record_kernel(
    source,  # [tokens, WIDTH]
    rows,  # [tokens]
    positions,  # [tokens]
    ring,  # [requests + 1, LENGTH, SLOTS, WIDTH]
    slot,
    stride,
    LENGTH: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64) % LENGTH
    target = ring + ((row * LENGTH + position) * SLOTS + slot) * WIDTH
    for block in range(0, WIDTH, BLOCK):
        i = block + tl.arange(0, BLOCK)
        inside = i < WIDTH
        if LAST:  # a later token of this request takes the place
            tokens = tl.num_programs(0)
            inside &= tl.load(rows + token + LENGTH, mask=token + LENGTH < tokens, other=-1).to(tl.int64) != row
        tl.store(target + i, tl.load(source + token * stride + i, mask=inside), mask=inside)
