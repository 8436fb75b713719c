"""project_queries: what the indexer's query tower makes of the recent queries of several requests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lsa.kernels.page_score import SPAN, Ragged

BLOCK_DIM = 32
"""Numbers of a query that are multiplied at a time."""


def project_queries(ring: torch.Tensor, asked: Ragged, heads: torch.Tensor, tower: torch.Tensor) -> torch.Tensor:
    """Multiply the queries of a few heads by a matrix each.

    What a request gets does not depend on the others, bit for bit, as that of a batched matrix product may.

    Args:
        ring: ``[rows, places, layers, q_heads, head_dim]``, contiguous; recent post-RoPE queries of each row.
        asked: the requests, and where their queries are.
        heads: int64 ``[heads]``, which of the ``layers * q_heads`` they are.
        tower: float32 ``[heads, head_dim, dim]``.

    Returns:
        float32 ``[requests, heads, places, dim]``; of each request its positions, and nothing that counts after them.

    Raises:
        ValueError: queries and matrices do not fit.
    """
    if len(heads) != len(tower) or ring.shape[4] != tower.shape[1]:
        raise ValueError(f"queries {tuple(ring.shape)} of {len(heads)} heads do not fit matrices {tuple(tower.shape)}")
    return (_project_queries_triton if ring.is_cuda else project_queries_reference)(ring, asked, heads, tower)


def project_queries_reference(ring, asked, heads, tower) -> torch.Tensor:
    """See :func:`project_queries`."""
    found = torch.zeros((len(asked), len(heads), ring.shape[1], tower.shape[2]), device=ring.device)
    for i in range(len(asked)):
        recent = asked.recent(ring, i).flatten(1, 2).index_select(1, heads).transpose(0, 1).float()
        found[i, :, : recent.shape[1]] = recent @ tower
    return found


def _project_queries_triton(ring, asked, heads, tower) -> torch.Tensor:
    _, places, layers, q_heads, head_dim = ring.shape
    dim = tower.shape[2]
    found = torch.empty((len(asked), len(heads), places, dim), dtype=torch.float32, device=ring.device)
    block_places = max(16, min(64, triton.next_power_of_2(places)))
    _project_queries_kernel[(len(asked), len(heads), triton.cdiv(places, block_places))](
        ring,
        asked.spans,
        heads,
        tower.contiguous(),
        found,
        PLACES=places,
        ALL_HEADS=layers * q_heads,
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_PLACES=block_places,
        BLOCK_HEAD_DIM=BLOCK_DIM,
        BLOCK_OUT=max(16, triton.next_power_of_2(dim)),
        SPAN=SPAN,
    )
    return found


@triton.jit(do_not_specialize_on_alignment=["spans"])
def _project_queries_kernel(
    ring,  # [rows, PLACES, ALL_HEADS, HEAD_DIM]
    spans,  # int64 [requests, SPAN] of Ragged
    heads,  # int64 [heads]
    tower,  # float32 [heads, HEAD_DIM, DIM]
    found,  # float32 [requests, heads, PLACES, DIM]
    PLACES: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SPAN: tl.constexpr,
):
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, first = tl.load(spans + request * SPAN), tl.load(spans + request * SPAN + 1)
    position = tl.program_id(2) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    there = position < tl.load(spans + request * SPAN + 2)
    place = row * PLACES + (first + position) % PLACES
    query = ring + (place * ALL_HEADS + tl.load(heads + head)) * HEAD_DIM
    out = tl.arange(0, BLOCK_OUT)
    total = tl.zeros((BLOCK_PLACES, BLOCK_OUT), tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_HEAD_DIM):
        d = start + tl.arange(0, BLOCK_HEAD_DIM)
        q = tl.load(query[:, None] + d[None, :], mask=there[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        at = (head * HEAD_DIM + d)[:, None] * DIM + out[None, :]
        weight = tl.load(tower + at, mask=(d < HEAD_DIM)[:, None] & (out < DIM)[None, :], other=0.0)
        total = tl.dot(q.to(tl.float32), weight, total, input_precision="ieee")
    to = ((request * tl.num_programs(1) + head) * PLACES + position)[:, None] * DIM + out[None, :]
    tl.store(found + to, total, mask=there[:, None] & (out < DIM)[None, :])
