"""stage_pages: one layer of host pages, side by side on the device, for prefill to read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Words of 8 bytes that one program moves at a time."""
PROGRAMS = 24
"""Programs of a copy: enough to fill PCIe 5; attention has the rest of the chip."""


def stage_pages(
    mirror: torch.Tensor, pages: torch.Tensor, layer: int, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Copy one layer of mirror pages into contiguous buffers, in the order given.

    On a GPU the mirror must be page-locked, and the copy is asynchronous on the current stream.

    Args:
        mirror: ``[virtual_pages + 1, layers, 2, page, kv_heads, head_dim]`` host memory.
        pages: int64 ``[n]`` virtual pages, on the device of ``keys``.
        layer: which one.
        keys, values: ``[capacity, kv_heads, head_dim]`` contiguous, output; ``n * page`` rows are written.

    Raises:
        ValueError: the buffers hold fewer than ``n`` pages, or are not contiguous.
    """
    page = mirror.shape[3]
    for buffer in (keys, values):
        if len(buffer) < len(pages) * page or not buffer.is_contiguous():
            raise ValueError(
                f"a staging buffer of {len(buffer)} rows with strides {buffer.stride()} cannot take {len(pages)} "
                f"pages of {page} tokens: give it {len(pages) * page} contiguous rows"
            )
    (_stage_pages_triton if keys.is_cuda else stage_pages_reference)(mirror, pages, layer, keys, values)


def stage_pages_reference(mirror, pages, layer, keys, values) -> None:
    """See :func:`stage_pages`."""
    page, count = mirror.shape[3], len(pages)
    for which, buffer in enumerate((keys, values)):
        rows = buffer[: count * page].view(count, page, *buffer.shape[1:])
        torch.index_select(mirror[:, layer, which], 0, pages, out=rows)


def _stage_pages_triton(mirror, pages, layer, keys, values) -> None:
    piece = mirror[0, 0, 0].numel() * mirror.element_size()
    if piece % 8:
        raise ValueError(f"a page has {piece} bytes in a layer, which is not a multiple of 8")
    if not len(pages):
        return
    words = piece // 8
    blocks = triton.cdiv(words, BLOCK)
    _stage_pages_kernel[(min(PROGRAMS, len(pages) * 2 * blocks),)](
        mirror.data_ptr(),
        pages,
        keys.flatten().view(torch.int64),
        values.flatten().view(torch.int64),
        len(pages),
        layer,
        LAYERS=mirror.shape[1],
        WORDS=words,
        BLOCKS=blocks,
        BLOCK=BLOCK,
        num_warps=16,
    )


@triton.jit(do_not_specialize=["n", "layer"], do_not_specialize_on_alignment=["pages"])
def _stage_pages_kernel(
    mirror,  # address of the host mirror
    pages,  # int64 [n]
    keys,  # int64 words of [n, page, kv_heads, head_dim]
    values,
    n,
    layer,
    LAYERS: tl.constexpr,
    WORDS: tl.constexpr,  # 8-byte words of a page's keys in one layer
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    source = tl.multiple_of(mirror.to(tl.pointer_type(tl.int64)), 16)
    for work in range(tl.program_id(0), n * 2 * BLOCKS, tl.num_programs(0)):
        index = work // (2 * BLOCKS)
        which = work // BLOCKS % 2
        word = work % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        inside = word < WORDS
        v = tl.load(pages + index)
        found = tl.load(source + ((v * LAYERS + layer) * 2 + which) * WORDS + word, mask=inside)
        place = index.to(tl.int64) * WORDS + word
        if which == 0:
            tl.store(keys + place, found, mask=inside)
        else:
            tl.store(values + place, found, mask=inside)
