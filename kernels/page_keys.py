"""page_keys: what the selector remembers of a page. Here Quest's bounds: minimum and maximum of its keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


def key_bounds(keys: torch.Tensor) -> torch.Tensor:
    """Elementwise bounds of the keys of each page.

    Args:
        keys: ``[pages, tokens, kv_heads, head_dim]``, post-RoPE, any float type.

    Returns:
        ``[pages, 2, kv_heads, head_dim]``: minimum, then maximum, in the type of ``keys``.

    Source: Tang et al., Quest (ICML 2024), section 3.2.
    """
    return torch.stack((keys.amin(dim=1), keys.amax(dim=1)), dim=1)


def store_key_bounds(
    pools: Sequence[torch.Tensor], physical: torch.Tensor, virtual: torch.Tensor, table: torch.Tensor, page: int
) -> None:
    """Compute the bounds of pages in the device pool and put them into the table of all pages.

    Args:
        pools: per observed layer ``[slots, kv_heads, head_dim]``, SGLang's key buffers.
        physical, virtual: int64 ``[n]`` where each page is now, and where its bounds go.
        table: ``[virtual_pages + 1, layers, 2, kv_heads, head_dim]``, output.
        page: tokens in a page.
    """
    run = _store_key_bounds_triton if table.is_cuda else store_key_bounds_reference
    run(pools, physical, virtual, table, page)


def store_key_bounds_reference(pools, physical, virtual, table, page) -> None:
    """See :func:`store_key_bounds`."""
    for layer, pool in enumerate(pools):
        table[virtual, layer] = key_bounds(pool.view(-1, page, *pool.shape[1:])[physical])


def _store_key_bounds_triton(pools, physical, virtual, table, page) -> None:
    _, layers, _, kv_heads, head_dim = table.shape
    for layer, pool in enumerate(pools):
        if not pool.is_contiguous():
            raise ValueError(f"key buffer with strides {pool.stride()} is not contiguous")
        if len(physical):
            _key_bounds_kernel[(len(physical), kv_heads)](
                pool,
                physical,
                virtual,
                table,
                layer,
                LAYERS=layers,
                HEADS=kv_heads,
                DIM=head_dim,
                PAGE=page,
                BLOCK_PAGE=triton.next_power_of_2(page),
                BLOCK_DIM=triton.next_power_of_2(head_dim),
            )


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["physical", "virtual"])
def _key_bounds_kernel(
    pool,  # [slots, HEADS, DIM]
    physical,  # int64 [n]
    virtual,  # int64 [n]
    table,  # [virtual_pages + 1, LAYERS, 2, HEADS, DIM]
    layer,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_PAGE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    head = tl.program_id(1)
    p = tl.load(physical + tl.program_id(0))
    v = tl.load(virtual + tl.program_id(0))
    token = tl.arange(0, BLOCK_PAGE)
    d = tl.arange(0, BLOCK_DIM)
    inside = (token < PAGE)[:, None] & (d < DIM)[None, :]
    source = pool + ((p * PAGE + token)[:, None] * HEADS + head) * DIM + d[None, :]
    low = tl.min(tl.load(source, mask=inside, other=float("inf")).to(tl.float32), axis=0)
    high = tl.max(tl.load(source, mask=inside, other=float("-inf")).to(tl.float32), axis=0)
    target = table + (((v * LAYERS + layer) * 2) * HEADS + head) * DIM + d
    tl.store(target, low, mask=d < DIM)
    tl.store(target + HEADS * DIM, high, mask=d < DIM)
