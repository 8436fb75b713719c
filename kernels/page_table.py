"""page_table: the token slots or pages that attention reads, from resident pages and a request's tail."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def decode_indices(
    table: torch.Tensor,
    req_to_token: torch.Tensor,
    v2p: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    page: int,
    indptr: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write FlashInfer's plan input for a decode batch: physical slots of all requests, one after the other.

    A request reads its resident pages in order, then every token from ``tail_start`` pages on. A dense request has no
    resident pages and a tail that starts at 0.

    Args:
        table: int32 ``[requests + 1, 2 + max_resident]`` by request row: number of resident pages, page where the
            tail starts, and the physical ids of those pages. Row 0 is padding.
        req_to_token: ``[requests + 1, max_context]`` SGLang's table of virtual slots.
        v2p: ``[virtual_pages + 1]`` physical page of a virtual page.
        rows: ``[batch]`` request rows of this batch.
        seq_lens: ``[batch]`` tokens of each request, the new one included.
        page: tokens in a page.
        indptr: int32 ``[batch + 1]`` or longer, output: where each request's slots start.
        indices: int32 output, at least as long as all requests' slots.
    """
    run = _decode_indices_triton if table.is_cuda else decode_indices_reference
    run(table, req_to_token, v2p, rows, seq_lens, page, indptr, indices)


def decode_indices_reference(table, req_to_token, v2p, rows, seq_lens, page, indptr, indices) -> None:
    """See :func:`decode_indices`."""
    slots = resident_slots(table[:, 2:], table[:, 0], table[:, 1], req_to_token, v2p, rows, seq_lens, page)
    lengths = torch.tensor([0, *(len(s) for s in slots)], device=indptr.device)
    indptr[: len(rows) + 1] = lengths.cumsum(0)
    if slots:
        flat = torch.cat(slots)
        indices[: len(flat)] = flat


def decode_pages(
    table: torch.Tensor,
    req_to_token: torch.Tensor,
    v2p: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    page: int,
    pages: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Write FlashAttention's page table for a batch: physical pages of each request, and the tokens that they hold.

    What a request reads, and the first arguments, are as in :func:`decode_indices`. Pages are whole but for the last.

    Args:
        pages: int32 ``[batch, width]`` or with more rows, output; ``width`` is at least the pages that any request
            reads. Beyond those of a request, a row stays as it was.
        lengths: int32 ``[batch]`` or longer, output: tokens that each request reads.
    """
    run = _decode_pages_triton if table.is_cuda else decode_pages_reference
    run(table, req_to_token, v2p, rows, seq_lens, page, pages, lengths)


def decode_pages_reference(table, req_to_token, v2p, rows, seq_lens, page, pages, lengths) -> None:
    """See :func:`decode_pages`."""
    slots = resident_slots(table[:, 2:], table[:, 0], table[:, 1], req_to_token, v2p, rows, seq_lens, page)
    for index, read in enumerate(slots):
        first = read[::page] // page
        pages[index, : len(first)] = first
        lengths[index] = len(read)


def resident_slots(
    resident_pages: torch.Tensor,
    resident_count: torch.Tensor,
    tail_start: torch.Tensor,
    req_to_token: torch.Tensor,
    v2p: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    page: int,
) -> list[torch.Tensor]:
    """Physical slots of each request: its resident pages in order, then every token from ``tail_start`` pages on.

    Args:
        resident_pages: ``[requests + 1, max_resident]`` physical page ids by request row; row 0 is padding.
        resident_count: ``[requests + 1]`` how many of them count.
        tail_start: ``[requests + 1]`` in pages; all tokens from there on are read.
        req_to_token, v2p, rows, seq_lens, page: as in :func:`decode_indices`.

    Returns:
        One int64 tensor of slots per request, in order of position.
    """
    offsets = torch.arange(page, device=resident_pages.device)
    slots = []
    for row, length in zip(rows.tolist(), seq_lens.tolist(), strict=True):
        kept = resident_pages[row, : int(resident_count[row])].long()
        tail = physical_slots_reference(req_to_token[row, int(tail_start[row]) * page : length], v2p, page)
        slots.append(torch.cat(((kept[:, None] * page + offsets).flatten(), tail)))
    return slots


def physical_slots(virtual: torch.Tensor, v2p: torch.Tensor, page: int) -> torch.Tensor:
    """Physical slots of virtual slots, int64, any shape."""
    return (_physical_slots_triton if virtual.is_cuda else physical_slots_reference)(virtual, v2p, page)


def physical_slots_reference(virtual: torch.Tensor, v2p: torch.Tensor, page: int) -> torch.Tensor:
    """See :func:`physical_slots`."""
    virtual = virtual.long()
    return v2p[virtual // page].long() * page + virtual % page


LANES = (8, 64, 512)
"""Sizes of batches, at most, for which the kernel is compiled; beyond the last, powers of two."""


def lanes_for(batch: int) -> int:
    """Requests that one program of the kernel has room for, at least ``batch``: few sizes, for each is compiled."""
    return next((lanes for lanes in LANES if batch <= lanes), triton.next_power_of_2(batch))


def _decode_indices_triton(table, req_to_token, v2p, rows, seq_lens, page, indptr, indices) -> None:
    batch = len(rows)
    if batch == 0:
        return
    parts = max(1, min(64, 512 // batch))
    _decode_indices_kernel[(batch, parts)](
        table,
        req_to_token,
        v2p,
        rows,
        seq_lens,
        indptr,
        indices,
        batch,
        table.stride(0),
        req_to_token.stride(0),
        PAGE=page,
        BATCH=lanes_for(batch),
        BLOCK=512,
    )


@triton.jit(do_not_specialize=["batch", "table_stride", "req_stride"])
def _decode_indices_kernel(
    table,  # int32 [requests + 1, 2 + max_resident]
    req_to_token,  # int32 [requests + 1, max_context]
    v2p,  # int32 [virtual_pages + 1]
    rows,  # [batch]
    seq_lens,  # [batch]
    indptr,  # int32 [batch + 1]
    indices,  # int32 [all slots]
    batch,
    table_stride,
    req_stride,
    PAGE: tl.constexpr,
    BATCH: tl.constexpr,  # power of two, at least batch
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    # Every program sums the lengths of the requests before its own: no second launch, no synchronisation.
    each = tl.arange(0, BATCH)
    real = each < batch
    each_row = tl.load(rows + each, mask=real, other=0).to(tl.int64)
    counts = tl.load(table + each_row * table_stride, mask=real, other=0)
    tails = tl.load(table + each_row * table_stride + 1, mask=real, other=0)
    lengths = (counts - tails) * PAGE + tl.load(seq_lens + each, mask=real, other=0).to(tl.int32)
    lengths = tl.where(real, lengths, 0)
    start = tl.sum(tl.where(each < request, lengths, 0))
    length = tl.sum(tl.where(each == request, lengths, 0))
    if tl.program_id(1) == 0:
        tl.store(indptr + request + 1, start + length)
        if request == 0:
            tl.store(indptr, 0)
    row = tl.load(rows + request).to(tl.int64)
    resident = table + row * table_stride + 2
    kept = tl.load(table + row * table_stride) * PAGE
    tail = req_to_token + row * req_stride + tl.load(table + row * table_stride + 1) * PAGE
    for block in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        i = block + tl.arange(0, BLOCK)
        inside = i < length
        in_pages = i < kept
        physical = tl.load(resident + i // PAGE, mask=inside & in_pages, other=0)
        virtual = tl.load(tail + i - kept, mask=inside & (i >= kept), other=0)
        physical_of_tail = tl.load(v2p + virtual // PAGE, mask=inside & (i >= kept), other=0)
        slot = tl.where(in_pages, physical * PAGE + i % PAGE, physical_of_tail * PAGE + virtual % PAGE)
        tl.store(indices + start + i, slot.to(tl.int32), mask=inside)


def _decode_pages_triton(table, req_to_token, v2p, rows, seq_lens, page, pages, lengths) -> None:
    batch = len(rows)
    if batch == 0:
        return
    _decode_pages_kernel[(batch, max(1, min(16, 512 // batch)))](
        table,
        req_to_token,
        v2p,
        rows,
        seq_lens,
        pages,
        lengths,
        table.stride(0),
        req_to_token.stride(0),
        pages.stride(0),
        PAGE=page,
        BLOCK=256,
    )


@triton.jit(
    do_not_specialize=["table_stride", "req_stride", "pages_stride"],
    do_not_specialize_on_alignment=["rows", "seq_lens", "pages", "lengths"],
)
def _decode_pages_kernel(
    table,  # int32 [requests + 1, 2 + max_resident]
    req_to_token,  # int32 [requests + 1, max_context]
    v2p,  # int32 [virtual_pages + 1]
    rows,  # [batch]
    seq_lens,  # [batch]
    pages,  # int32 [batch, width]
    lengths,  # int32 [batch]
    table_stride,
    req_stride,
    pages_stride,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.load(rows + request).to(tl.int64)
    count = tl.load(table + row * table_stride)
    tail_start = tl.load(table + row * table_stride + 1)
    length = (count - tail_start) * PAGE + tl.load(seq_lens + request).to(tl.int32)
    if tl.program_id(1) == 0:
        tl.store(lengths + request, length)
    resident = table + row * table_stride + 2
    tail = req_to_token + row * req_stride + tail_start.to(tl.int64) * PAGE
    out = pages + request.to(tl.int64) * pages_stride
    read = tl.cdiv(length, PAGE)
    for block in range(tl.program_id(1) * BLOCK, read, tl.num_programs(1) * BLOCK):
        i = block + tl.arange(0, BLOCK)
        inside = i < read
        in_set = i < count
        physical = tl.load(resident + i, mask=inside & in_set, other=0)
        virtual = tl.load(tail + (i - count) * PAGE, mask=inside & (i >= count), other=0)
        of_tail = tl.load(v2p + virtual // PAGE, mask=inside & (i >= count), other=0)
        tl.store(out + i, tl.where(in_set, physical, of_tail).to(tl.int32), mask=inside)


def _physical_slots_triton(virtual: torch.Tensor, v2p: torch.Tensor, page: int) -> torch.Tensor:
    virtual = virtual.contiguous()
    slots = torch.empty(virtual.shape, dtype=torch.int64, device=virtual.device)
    n = virtual.numel()
    if n:
        _physical_slots_kernel[(triton.cdiv(n, 1024),)](virtual, v2p, slots, n, PAGE=page, BLOCK=1024)
    return slots


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["virtual"])
def _physical_slots_kernel(virtual, v2p, slots, n, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    v = tl.load(virtual + i, mask=inside, other=0).to(tl.int64)
    p = tl.load(v2p + v // PAGE, mask=inside, other=0).to(tl.int64)
    tl.store(slots + i, p * PAGE + v % PAGE, mask=inside)
