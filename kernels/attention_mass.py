"""attention_mass: how much of its attention each head pays to each page; what a memory indexer learns to predict."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

QUERIES_AT_ONCE = 128
"""Positions whose attention the torch reference holds in memory at a time."""


def attention_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    page: int,
) -> torch.Tensor:
    """The share of causal attention that falls on each page, for every head of one layer and one request.

    Args:
        queries: ``[tokens, q_heads, head_dim]``, post-RoPE.
        keys: ``[pool, kv_heads, head_dim]``, the layer's key buffer.
        slots: int64 ``[context]`` where the request's tokens are in it, in order.
        positions: int64 ``[tokens]`` position of each query; it sees the keys up to its own.
        scale: the model's softmax scale.
        page: tokens in a page.

    Returns:
        float32 ``[tokens, q_heads, pages]``, the last page perhaps not full; the sum over pages is 1.

    Raises:
        ValueError: the heads of queries and keys do not fit.
    """
    _, q_heads, head_dim = queries.shape
    if q_heads % keys.shape[1] or keys.shape[2] != head_dim:
        raise ValueError(f"queries {tuple(queries.shape)} do not fit keys {tuple(keys.shape)}")
    if not len(queries) or not len(slots):
        return torch.zeros((len(queries), q_heads, -(-len(slots) // page)), device=queries.device)
    run = _attention_mass_triton if keys.is_cuda else attention_mass_reference
    return run(queries, keys, slots, positions, scale, page)


def attention_mass_reference(queries, keys, slots, positions, scale, page) -> torch.Tensor:
    """See :func:`attention_mass`."""
    kv_heads, context = keys.shape[1], len(slots)
    pages = -(-context // page)
    known = keys[slots].float()  # [context, kv_heads, head_dim]
    mass = []
    for block, at in zip(queries.split(QUERIES_AT_ONCE), positions.split(QUERIES_AT_ONCE), strict=True):
        q = block.float().unflatten(1, (kv_heads, -1))
        logits = torch.einsum("tkgd,ckd->tkgc", q, known).flatten(1, 2) * scale
        later = torch.arange(context, device=at.device)[None, :] > at[:, None]
        share = logits.masked_fill_(later[:, None, :], float("-inf")).softmax(dim=-1)
        share = torch.nn.functional.pad(share, (0, pages * page - context))
        mass.append(share.unflatten(-1, (pages, page)).sum(dim=-1))
    return torch.cat(mass)


def _attention_mass_triton(queries, keys, slots, positions, scale, page) -> torch.Tensor:
    tokens, q_heads, head_dim = queries.shape
    kv_heads, context = keys.shape[1], len(slots)
    if not keys.is_contiguous():
        raise ValueError(f"key buffer with strides {keys.stride()} is not contiguous")
    group, pages = q_heads // kv_heads, triton.cdiv(context, page)
    mass = torch.empty((tokens, q_heads, pages), dtype=torch.float32, device=keys.device)
    block_rows = max(16, min(64, triton.next_power_of_2(tokens * group)))
    _attention_mass_kernel[(triton.cdiv(tokens * group, block_rows), kv_heads)](
        queries.to(keys.dtype).contiguous(),
        keys,
        slots,
        positions,
        mass,
        scale,
        tokens,
        context,
        pages,
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=head_dim,
        PAGE=page,
        BLOCK_ROWS=block_rows,
        BLOCK_PAGE=max(16, triton.next_power_of_2(page)),
        BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)),
        PRECISE=keys.dtype == torch.float32,
    )
    return mass


@triton.jit(
    do_not_specialize=["scale", "tokens", "context", "pages"],
    do_not_specialize_on_alignment=["slots", "positions"],
)
def _attention_mass_kernel(
    queries,  # [tokens, KV_HEADS * GROUP, DIM]
    keys,  # [pool, KV_HEADS, DIM]
    slots,  # int64 [context]
    positions,  # int64 [tokens]
    mass,  # float32 [tokens, KV_HEADS * GROUP, pages]
    scale,
    tokens,
    context,
    pages,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAGE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISE: tl.constexpr,
):
    kv_head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # a token and a head of this group
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    real = token < tokens
    d = tl.arange(0, BLOCK_DIM)
    t = tl.arange(0, BLOCK_PAGE)
    place = token.to(tl.int64) * (KV_HEADS * GROUP) + head
    q = tl.load(queries + place[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    at = tl.load(positions + token, mask=real, other=0)
    most = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    # Twice over all pages: first the softmax's maximum and sum, then each page's share.
    for page in range(2 * pages):
        first = (page % pages) * PAGE
        inside = (t < PAGE) & (first + t < context)
        slot = tl.load(slots + first + t, mask=inside, other=0)
        k_at = keys + (slot * KV_HEADS + kv_head)[None, :] * DIM + d[:, None]
        k = tl.load(k_at, mask=inside[None, :] & (d < DIM)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") if PRECISE else tl.dot(q, k)
        seen = inside[None, :] & (first + t[None, :] <= at[:, None])
        logits = tl.where(seen, logits * scale, float("-inf"))
        if page < pages:
            higher = tl.maximum(most, tl.max(logits, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(most - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
            most = higher
        else:
            share = tl.sum(tl.exp(logits - most[:, None]), axis=1) / total
            tl.store(mass + place * pages + (page - pages), share, mask=real)
