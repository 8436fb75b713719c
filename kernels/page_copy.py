"""page_copy: whole pages between the layer-first device pool and the page-contiguous host mirror."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Words of 8 bytes that one program moves at a time."""
PROGRAMS = 24
"""Programs of a copy: enough to fill PCIe 5; more would only keep multiprocessors from decode."""


def pages_to_host(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    physical: torch.Tensor,
    mirror: torch.Tensor,
    virtual: torch.Tensor,
) -> None:
    """Copy device pages ``physical`` into mirror pages ``virtual``.

    On a GPU the mirror must be page-locked, and the copy is asynchronous on the current stream.

    Args:
        keys, values: per layer ``[physical_pages * page, kv_heads, head_dim]``, the pool's buffers.
        physical, virtual: int64 ``[n]`` on the device of ``keys``.
        mirror: ``[virtual_pages + 1, layers, 2, page, kv_heads, head_dim]`` host memory.
    """
    _check(keys, values, mirror)
    if keys[0].is_cuda:
        copy_pages_triton(pool_addresses(keys, values), physical, mirror, virtual, to_host=True)
        return
    page = mirror.shape[3]
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        mirror[virtual, layer, 0] = _paged(k, page)[physical].to(mirror.device)
        mirror[virtual, layer, 1] = _paged(v, page)[physical].to(mirror.device)


def pages_from_host(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    physical: torch.Tensor,
    mirror: torch.Tensor,
    virtual: torch.Tensor,
) -> None:
    """Copy mirror pages ``virtual`` into device pages ``physical``; arguments as in :func:`pages_to_host`."""
    _check(keys, values, mirror)
    if keys[0].is_cuda:
        copy_pages_triton(pool_addresses(keys, values), physical, mirror, virtual, to_host=False)
        return
    page = mirror.shape[3]
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        _paged(k, page)[physical] = mirror[virtual, layer, 0].to(k.device)
        _paged(v, page)[physical] = mirror[virtual, layer, 1].to(v.device)


def pool_addresses(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Addresses of the pool's buffers, int64 ``[layers, 2]`` on their device.

    Raises:
        ValueError: a buffer is not contiguous.
    """
    pairs = list(zip(keys, values, strict=True))
    for buffer in (*keys, *values):
        if not buffer.is_contiguous():
            raise ValueError(f"pool buffer with strides {buffer.stride()} is not contiguous: pages cannot be copied")
    addresses = [[k.data_ptr(), v.data_ptr()] for k, v in pairs]
    return torch.tensor(addresses, dtype=torch.int64, device=keys[0].device)


def copy_pages_triton(
    addresses: torch.Tensor,
    physical: torch.Tensor,
    mirror: torch.Tensor,
    virtual: torch.Tensor,
    *,
    to_host: bool,
    layer: int | None = None,
) -> None:
    """One launch: :func:`pages_to_host` or :func:`pages_from_host` with addresses looked up before.

    Args:
        addresses: from :func:`pool_addresses`.
        layer: copy this one only; otherwise all.

    Raises:
        ValueError: a layer's part of a page is not a multiple of 8 bytes.
    """
    piece = mirror[0, 0, 0].numel() * mirror.element_size()
    if piece % 8:
        raise ValueError(f"a page has {piece} bytes in a layer, which is not a multiple of 8")
    if not len(physical):
        return
    layers, words = mirror.shape[1], piece // 8
    blocks = triton.cdiv(words, BLOCK)
    buffers = layers * 2 if layer is None else 2
    programs = min(PROGRAMS, len(physical) * buffers * blocks)
    _copy_pages_kernel[(programs,)](
        addresses,
        mirror.data_ptr(),
        physical,
        virtual,
        len(physical),
        0 if layer is None else layer * 2,
        buffers,
        BUFFERS=layers * 2,
        WORDS=words,
        BLOCKS=blocks,
        BLOCK=BLOCK,
        TO_HOST=to_host,
        num_warps=16,
    )


@triton.jit(do_not_specialize=["n", "first", "count"], do_not_specialize_on_alignment=["physical", "virtual"])
def _copy_pages_kernel(
    addresses,  # int64 [BUFFERS]
    mirror,  # address of the host mirror
    physical,  # int64 [n]
    virtual,  # int64 [n]
    n,
    first,  # buffer to begin with
    count,  # buffers to copy
    BUFFERS: tl.constexpr,  # layers * 2
    WORDS: tl.constexpr,  # 8-byte words of a page in one buffer
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TO_HOST: tl.constexpr,
):
    # Few programs walk over all (page, buffer, block): the bus is the limit, and the rest of the chip is decoding.
    for work in range(tl.program_id(0), n * count * BLOCKS, tl.num_programs(0)):
        index = work // (count * BLOCKS)
        buffer = first + work // BLOCKS % count
        word = work % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        inside = word < WORDS
        p = tl.load(physical + index)
        v = tl.load(virtual + index)
        # Allocations are aligned to far more than 16 bytes; the compiler cannot know that of a loaded address.
        base = tl.multiple_of(tl.load(addresses + buffer).to(tl.pointer_type(tl.int64)), 16)
        device = base + p * WORDS + word
        host = tl.multiple_of(mirror.to(tl.pointer_type(tl.int64)), 16) + (v * BUFFERS + buffer) * WORDS + word
        if TO_HOST:
            tl.store(host, tl.load(device, mask=inside), mask=inside)
        else:
            tl.store(device, tl.load(host, mask=inside), mask=inside)


def _paged(buffer: torch.Tensor, page: int) -> torch.Tensor:
    return buffer.view(buffer.shape[0] // page, page, *buffer.shape[1:])


def _check(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], mirror: torch.Tensor) -> None:
    if len(keys) != mirror.shape[1] or len(values) != mirror.shape[1] or mirror.shape[2] != 2:
        raise ValueError(
            f"mirror {tuple(mirror.shape)} does not fit {len(keys)} layers of keys and {len(values)} of values: "
            "shape it [pages, layers, 2, page, kv_heads, head_dim]"
        )
