"""page_score of one request, by kernels of its own: those that have run on GPUs since the first release.

The kernels of ``page_score`` score several requests in one call. They have been compared with their references in
Triton's interpreter, and take over on GPUs, too, once they were compared there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def from_8_bits_kernel(
    bits,  # int32, each a byte of to_8_bits
):
    """:func:`from_8_bits` in a kernel, by hand, which every device and the interpreter can do."""
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).to(tl.float32)
    size = tl.where(exponent == 0, mantissa, (mantissa + 8) * tl.exp2((exponent - 1).to(tl.float32))) * 0.001953125
    return tl.where((bits & 128) != 0, -size, size)


def page_score_single(queries, table, pages, key_of_head) -> torch.Tensor:
    """See ``page_score``; on a GPU."""
    heads, positions, dim = queries.shape
    _, key_heads, sub_keys, _ = table.shape
    n = len(pages)
    queries = queries.contiguous()
    block_voters = max(16, min(64, triton.next_power_of_2(positions)))
    voter_blocks = triton.cdiv(positions, block_voters)
    block_pages = max(1, 128 // sub_keys)
    blocks = triton.cdiv(n, block_pages)
    partial = torch.empty((heads, blocks, voter_blocks * block_voters), dtype=torch.float32, device=table.device)
    normaliser = torch.empty(0, dtype=torch.float32, device=table.device)
    shares = torch.zeros((heads, n), dtype=torch.float32, device=table.device)
    for last in (False, True):
        _single_kernel[(blocks, heads, voter_blocks)](
            queries,
            table,
            pages,
            key_of_head,
            normaliser if last else partial,
            shares,
            n,
            blocks,
            positions,
            KEY_HEADS=key_heads,
            SUB_KEYS=sub_keys,
            DIM=dim,
            VOTERS=voter_blocks * block_voters,
            BLOCK_VOTERS=block_voters,
            BLOCK_PAGES=block_pages,
            BLOCK_DIM=max(16, triton.next_power_of_2(dim)),
            LAST=last,
        )
        normaliser = partial.logsumexp(dim=1)
    return shares


@triton.jit(do_not_specialize=["n", "blocks", "positions"], do_not_specialize_on_alignment=["pages"])
def _single_kernel(
    queries,  # [heads, positions, DIM]
    table,  # uint8 [virtual_pages + 1, KEY_HEADS, SUB_KEYS, DIM]
    pages,  # int64 [n]
    key_of_head,  # int64 [heads]
    sums,  # float32 log-sum-exp of each block [heads, blocks, VOTERS]; LAST: of all pages [heads, VOTERS]
    shares,  # float32 [heads, n], zeros at first
    n,
    blocks,
    positions,
    KEY_HEADS: tl.constexpr,
    SUB_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VOTERS: tl.constexpr,
    BLOCK_VOTERS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LAST: tl.constexpr,  # first launch: what a softmax over pages needs; second: the shares
):
    block = tl.program_id(0)
    head = tl.program_id(1)
    voter = tl.program_id(2) * BLOCK_VOTERS + tl.arange(0, BLOCK_VOTERS)
    key = tl.arange(0, BLOCK_PAGES * SUB_KEYS)
    index = block * BLOCK_PAGES + key // SUB_KEYS
    d = tl.arange(0, BLOCK_DIM)
    q_at = queries + (head * positions + voter)[:, None] * DIM + d[None, :]
    q = tl.load(q_at, mask=(voter < positions)[:, None] & (d < DIM)[None, :], other=0.0)
    page = tl.load(pages + index, mask=index < n, other=0)
    row = (page * KEY_HEADS + tl.load(key_of_head + head)) * SUB_KEYS + key % SUB_KEYS
    real = (index < n)[None, :] & (d < DIM)[:, None]
    bits = tl.load(table + row[None, :] * DIM + d[:, None], mask=real, other=0).to(tl.int32)
    logits = tl.dot(q, from_8_bits_kernel(bits).to(q.dtype), input_precision="ieee")
    logits = tl.where((index < n)[None, :], logits, float("-inf"))  # [BLOCK_VOTERS, BLOCK_PAGES * SUB_KEYS]
    if LAST:
        share = tl.exp(logits - tl.load(sums + head * VOTERS + voter)[:, None])
        of_page = tl.sum(tl.reshape(share, (BLOCK_VOTERS, BLOCK_PAGES, SUB_KEYS)), axis=2)
        best = tl.max(tl.where((voter < positions)[:, None], of_page, 0.0), axis=0)
        at = block * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
        tl.atomic_max(shares + head * n + at, best, mask=at < n)
    else:
        most = tl.max(logits, axis=1)
        total = tl.sum(tl.exp(logits - most[:, None]), axis=1)
        tl.store(sums + (head * blocks + block) * VOTERS + voter, most + tl.log(total))
