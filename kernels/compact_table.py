"""compact_table: the page table that attention over compressed entries reads, without the pages that are not there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lsa.kernels.page_table import resident_slots


def compact_table(
    table: torch.Tensor,
    req_to_token: torch.Tensor,
    v2p: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    page: int,
    ratio: int,
    pages: torch.Tensor,
    entries: torch.Tensor,
) -> None:
    """Write what a decode step of a model with compressed KV reads: physical pages, and how many entries they hold.

    A request reads its resident pages in order, then every page from ``tail_start`` on. An entry stands for ``ratio``
    tokens and is there once all of them are. Entries know their position, so a table without the absent pages selects
    among the resident entries what a mask over all entries would.

    Args:
        table: int32 ``[requests + 1, 2 + max_resident]`` by request row: number of resident pages, page where the
            tail starts, and the physical ids of those pages. Row 0 is padding.
        req_to_token: ``[requests + 1, max_context]`` SGLang's table of virtual slots.
        v2p: int32 ``[virtual_pages + 1]`` physical page of a virtual page.
        rows: ``[batch]`` request rows of this batch.
        seq_lens: ``[batch]`` tokens of each request, the new one included.
        page: tokens in a page, a multiple of ``ratio``.
        pages: int32 ``[batch, width]``, output; ``width`` is at least the pages that any request reads. Beyond those of
            a request it is 0, the padding page.
        entries: int32 ``[batch]``, output: entries that each request reads, 0 before the first is complete.
    """
    run = _compact_table_triton if table.is_cuda else compact_table_reference
    run(table, req_to_token, v2p, rows, seq_lens, page, ratio, pages, entries)


def compact_table_reference(table, req_to_token, v2p, rows, seq_lens, page, ratio, pages, entries) -> None:
    """See :func:`compact_table`."""
    pages.zero_()
    slots = resident_slots(table[:, 2:], table[:, 0], table[:, 1], req_to_token, v2p, rows, seq_lens, page)
    for index, read in enumerate(slots):
        first = read[::page] // page
        pages[index, : len(first)] = first
        entries[index] = len(read) // ratio


def to_physical(pages: torch.Tensor, v2p: torch.Tensor) -> None:
    """Replace virtual by physical pages, in place.

    Args:
        pages: int32, any contiguous shape; numbers that are no virtual page, and pages that are not on the device,
            become 0, the padding page.
        v2p: int32 ``[virtual_pages + 1]`` physical page of a virtual page.
    """
    (_to_physical_triton if pages.is_cuda else to_physical_reference)(pages, v2p)


def to_physical_reference(pages: torch.Tensor, v2p: torch.Tensor) -> None:
    """See :func:`to_physical`."""
    known = (pages >= 0) & (pages < len(v2p))
    pages.copy_(v2p[torch.where(known, pages, 0).long()].clamp_min(0))


def _compact_table_triton(table, req_to_token, v2p, rows, seq_lens, page, ratio, pages, entries) -> None:
    batch = len(rows)
    if batch == 0:
        return
    width, block = pages.shape[1], 256
    _compact_table_kernel[(batch, max(1, min(triton.cdiv(width, block), 512 // batch)))](
        table,
        req_to_token,
        v2p,
        rows,
        seq_lens,
        pages,
        entries,
        width,
        table.stride(0),
        req_to_token.stride(0),
        pages.stride(0),
        PAGE=page,
        RATIO=ratio,
        BLOCK=block,
    )


@triton.jit(
    do_not_specialize=["width", "table_stride", "req_stride", "pages_stride"],
    do_not_specialize_on_alignment=["rows", "seq_lens", "pages", "entries"],
)
def _compact_table_kernel(
    table,  # int32 [requests + 1, 2 + max_resident]
    req_to_token,  # int32 [requests + 1, max_context]
    v2p,  # int32 [virtual_pages + 1]
    rows,  # [batch]
    seq_lens,  # [batch]
    pages,  # int32 [batch, width]
    entries,  # int32 [batch]
    width,
    table_stride,
    req_stride,
    pages_stride,
    PAGE: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.load(rows + request).to(tl.int64)
    count = tl.load(table + row * table_stride)
    tail_start = tl.load(table + row * table_stride + 1)
    length = (count - tail_start) * PAGE + tl.load(seq_lens + request).to(tl.int32)
    if tl.program_id(1) == 0:
        tl.store(entries + request, length // RATIO)
    resident = table + row * table_stride + 2
    tail = req_to_token + row * req_stride + tail_start.to(tl.int64) * PAGE
    out = pages + request.to(tl.int64) * pages_stride
    read = tl.cdiv(length, PAGE)
    for block in range(tl.program_id(1) * BLOCK, width, tl.num_programs(1) * BLOCK):
        i = block + tl.arange(0, BLOCK)
        in_set, in_tail = i < count, (i >= count) & (i < read)
        physical = tl.load(resident + i, mask=in_set, other=0)
        virtual = tl.load(tail + (i - count).to(tl.int64) * PAGE, mask=in_tail, other=0)
        of_tail = tl.load(v2p + virtual // PAGE, mask=in_tail, other=0)
        tl.store(out + i, tl.where(in_set, physical, of_tail).to(tl.int32), mask=i < width)


def _to_physical_triton(pages: torch.Tensor, v2p: torch.Tensor) -> None:
    if not pages.is_contiguous():
        raise ValueError(f"pages with strides {pages.stride()} are not contiguous")
    n = pages.numel()
    if n:
        _to_physical_kernel[(triton.cdiv(n, 1024),)](pages, v2p, n, len(v2p), BLOCK=1024)


@triton.jit(do_not_specialize=["n", "virtual_pages"], do_not_specialize_on_alignment=["pages"])
def _to_physical_kernel(pages, v2p, n, virtual_pages, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    virtual = tl.load(pages + i, mask=i < n, other=0)
    known = (virtual >= 0) & (virtual < virtual_pages)
    physical = tl.load(v2p + virtual, mask=(i < n) & known, other=0)
    tl.store(pages + i, tl.maximum(physical, 0).to(tl.int32), mask=i < n)
