"""page_score: how much the next tokens are expected to attend to each page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MANY_PAGES = 8192
"""Above this, the kernel takes pages in larger blocks."""
PAGES_AT_ONCE = 4096
"""Pages whose logits the torch reference holds in memory at a time."""


def bound_score(queries: torch.Tensor, table: torch.Tensor, pages: torch.Tensor, scale: float) -> torch.Tensor:
    """Score pages by Quest's upper bound on their attention logits, the best vote of any head counting.

    For every query the bound of a page is ``sum_d max(q_d * min_d, q_d * max_d)``, the largest logit that any key
    inside the page's box could have. Bounds are normalised over pages with a softmax, so that heads of different
    scale can be compared, and a page's score is its maximum over positions, layers and heads: on a dense model a few
    retrieval heads carry the answer, and an average would lose them.

    Args:
        queries: ``[positions, layers, q_heads, head_dim]``, post-RoPE, the recent positions of one request.
        table: ``[virtual_pages + 1, layers, 2, kv_heads, head_dim]`` key bounds of every page, from
            :func:`sglang_lsa.kernels.page_keys.store_key_bounds`.
        pages: int64 ``[n]`` virtual ids of the request's pages.
        scale: the model's softmax scale.

    Returns:
        ``[n]`` float32 in [0, 1].

    Raises:
        ValueError: the heads of queries and keys do not fit.
    """
    _, layers, q_heads, head_dim = queries.shape
    kv_heads = table.shape[3]
    if q_heads % kv_heads or table.shape[1] != layers or table.shape[4] != head_dim:
        raise ValueError(f"queries {tuple(queries.shape)} do not fit key bounds {tuple(table.shape)}")
    if len(queries) == 0 or len(pages) == 0:
        return torch.zeros(len(pages), dtype=torch.float32, device=table.device)
    return (_bound_score_triton if table.is_cuda else bound_score_reference)(queries, table, pages, scale)


def bound_score_reference(queries, table, pages, scale) -> torch.Tensor:
    """See :func:`bound_score`. Two passes over the pages, so that memory does not grow with the context."""
    positions, layers, q_heads, head_dim = queries.shape
    kv_heads = table.shape[3]
    q = queries.float().view(positions, layers, kv_heads, q_heads // kv_heads, head_dim)
    blocks = pages.split(PAGES_AT_ONCE)

    def logits(block: torch.Tensor) -> torch.Tensor:
        low, high = table[block].float().unbind(dim=2)  # [pages, layers, kv_heads, head_dim]
        # max(q * low, q * high) is q+ * high + q- * low, which is two matrix products.
        sums = torch.einsum("tlkgd,plkd->tlkgp", q.clamp(min=0), high)
        sums += torch.einsum("tlkgd,plkd->tlkgp", q.clamp(max=0), low)
        return sums * scale

    if len(blocks) == 1:
        return logits(pages).softmax(dim=-1).amax(dim=(0, 1, 2, 3))
    normaliser = torch.stack([logits(block).logsumexp(dim=-1) for block in blocks]).logsumexp(dim=0)
    return torch.cat([(logits(block) - normaliser[..., None]).exp().amax(dim=(0, 1, 2, 3)) for block in blocks])


def _bound_score_triton(queries, table, pages, scale) -> torch.Tensor:
    positions, layers, q_heads, head_dim = queries.shape
    kv_heads, n = table.shape[3], len(pages)
    queries = queries.contiguous()
    group = q_heads // kv_heads
    block_pages = 64 if n <= MANY_PAGES else 128
    blocks = triton.cdiv(n, block_pages)
    voters = positions * group
    block_voters = max(16, min(128, triton.next_power_of_2(voters)))
    voter_blocks = triton.cdiv(voters, block_voters)
    grid = (blocks, layers * kv_heads, voter_blocks)
    partial = torch.empty(
        (layers * kv_heads, 2, blocks, voter_blocks * block_voters), dtype=torch.float32, device=table.device
    )
    scores = torch.zeros(n, dtype=torch.float32, device=table.device)
    for last in (False, True):
        _bound_score_kernel[grid](
            queries,
            table,
            pages,
            partial,
            scores,
            scale,
            n,
            blocks,
            voters,
            LAYERS=layers,
            KV_HEADS=kv_heads,
            GROUP=group,
            DIM=head_dim,
            VOTERS=voter_blocks * block_voters,
            BLOCK_VOTERS=block_voters,
            BLOCK_PAGES=block_pages,
            BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)),
            PRECISE=queries.dtype == torch.float32,
            LAST=last,
        )
    return scores


# One compilation serves every context length, so that none happens while serving.
@triton.jit(do_not_specialize=["scale", "n", "blocks", "voters"], do_not_specialize_on_alignment=["pages"])
def _bound_score_kernel(
    queries,  # [positions, LAYERS, KV_HEADS * GROUP, DIM]
    table,  # [virtual_pages + 1, LAYERS, 2, KV_HEADS, DIM]
    pages,  # int64 [n]
    partial,  # float32 [LAYERS * KV_HEADS, 2, blocks, VOTERS]: maximum, and sum of exponentials, of each block
    scores,  # float32 [n], zeros at first
    scale,
    n,
    blocks,
    voters,  # positions * GROUP
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VOTERS: tl.constexpr,
    BLOCK_VOTERS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISE: tl.constexpr,
    LAST: tl.constexpr,  # first launch: what a softmax over pages needs; second: the scores
):
    block = tl.program_id(0)
    layer = tl.program_id(1) // KV_HEADS
    head = tl.program_id(1) % KV_HEADS
    voter = tl.program_id(2) * BLOCK_VOTERS + tl.arange(0, BLOCK_VOTERS)  # a position and a head of this group
    index = block * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    d = tl.arange(0, BLOCK_DIM)
    votes = voter < voters
    row = (voter // GROUP) * LAYERS + layer
    q_at = queries + (row * KV_HEADS * GROUP + head * GROUP + voter % GROUP)[:, None] * DIM + d[None, :]
    q = tl.load(q_at, mask=votes[:, None] & (d < DIM)[None, :], other=0.0)
    page = tl.load(pages + index, mask=index < n, other=0)
    k_at = table + (((page * LAYERS + layer) * 2) * KV_HEADS + head)[None, :] * DIM + d[:, None]
    real = (index < n)[None, :] & (d < DIM)[:, None]
    low = tl.load(k_at, mask=real, other=0.0)
    high = tl.load(k_at + KV_HEADS * DIM, mask=real, other=0.0)
    zero = tl.zeros_like(q)
    if PRECISE:
        logits = tl.dot(tl.where(q > 0, q, zero), high, input_precision="ieee")
        logits = tl.dot(tl.where(q < 0, q, zero), low, logits, input_precision="ieee")
    else:
        logits = tl.dot(tl.where(q > 0, q, zero), high)
        logits = tl.dot(tl.where(q < 0, q, zero), low, logits)
    logits = tl.where((index < n)[None, :], logits * scale, float("-inf"))  # [BLOCK_VOTERS, BLOCK_PAGES]
    maxima = partial + tl.program_id(1) * 2 * blocks * VOTERS + voter
    sums = maxima + blocks * VOTERS
    if LAST:
        most = tl.load(maxima)
        for other in range(1, blocks):
            most = tl.maximum(most, tl.load(maxima + other * VOTERS))
        total = tl.zeros_like(most)
        for other in range(blocks):
            total += tl.load(sums + other * VOTERS) * tl.exp(tl.load(maxima + other * VOTERS) - most)
        share = tl.exp(logits - most[:, None]) / total[:, None]
        best = tl.max(tl.where(votes[:, None], share, 0.0), axis=0)
        tl.atomic_max(scores + index, best, mask=index < n)
    else:
        most = tl.max(logits, axis=1)
        tl.store(maxima + block * VOTERS, most)
        tl.store(sums + block * VOTERS, tl.sum(tl.exp(logits - most[:, None]), axis=1))


def page_score(
    queries: torch.Tensor, table: torch.Tensor, pages: torch.Tensor, key_of_head: torch.Tensor
) -> torch.Tensor:
    """The memory indexer's view of attention: the largest share that any recent position pays to each page.

    A page has a few keys, each from a run of its tokens. What a head pays is a softmax over the keys of all pages; a
    page gets the sum of its keys' shares, and the most that any position would pay it.

    Args:
        queries: ``[heads, positions, dim]``; the softmax scale is in them.
        table: uint8 ``[virtual_pages + 1, key_heads, sub_keys, dim]`` keys of every page, from :func:`to_8_bits`.
        pages: int64 ``[n]`` virtual ids of the request's pages.
        key_of_head: int64 ``[heads]``, which of the ``key_heads`` each head looks at.

    Returns:
        ``[heads, n]`` float32 in [0, 1]; zeros when there are no positions.

    Raises:
        ValueError: queries and keys do not fit, or keys are of another type.
    """
    if table.dtype != torch.uint8:
        raise ValueError(f"page keys are {table.dtype}: use what to_8_bits returns")
    if queries.shape[-1] != table.shape[-1] or len(queries) != len(key_of_head):
        raise ValueError(
            f"queries {tuple(queries.shape)} of {len(key_of_head)} heads do not fit page keys {tuple(table.shape)}"
        )
    if not queries.shape[1] or not len(pages):
        return torch.zeros((len(queries), len(pages)), dtype=torch.float32, device=table.device)
    return (_page_score_triton if table.is_cuda else page_score_reference)(queries, table, pages, key_of_head)


def page_score_reference(queries, table, pages, key_of_head) -> torch.Tensor:
    """See :func:`page_score`. Two passes over the pages, so that memory does not grow with the context."""
    blocks = pages.split(PAGES_AT_ONCE)

    def logits(block: torch.Tensor) -> torch.Tensor:
        keys = from_8_bits(table[block])[:, key_of_head]  # [n, heads, sub_keys, dim]
        return torch.einsum("htd,nhsd->htns", queries.float(), keys)

    if len(blocks) == 1:
        return attention_shares(logits(pages))
    normaliser = torch.stack([logits(block).logsumexp(dim=(2, 3)) for block in blocks]).logsumexp(dim=0)
    shares = [(logits(block) - normaliser[..., None, None]).exp().sum(dim=-1).amax(dim=1) for block in blocks]
    return torch.cat(shares, dim=1)


def to_8_bits(keys: torch.Tensor) -> torch.Tensor:
    """Numbers as bytes: fp8 (e4m3), which keeps three digits of the binary mantissa between 2^-6 and 448."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return keys.float().clamp(-most, most).to(torch.float8_e4m3fn).view(torch.uint8)


def from_8_bits(numbers: torch.Tensor) -> torch.Tensor:
    """The numbers that :func:`to_8_bits` made bytes of, float32."""
    return numbers.view(torch.float8_e4m3fn).float()


@triton.jit
def from_8_bits_kernel(
    bits,  # int32, each a byte of to_8_bits
):
    """:func:`from_8_bits` in a kernel, by hand, which every device and the interpreter can do."""
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).to(tl.float32)
    size = tl.where(exponent == 0, mantissa, (mantissa + 8) * tl.exp2((exponent - 1).to(tl.float32))) * 0.001953125
    return tl.where((bits & 128) != 0, -size, size)


def attention_shares(logits: torch.Tensor) -> torch.Tensor:
    """``[heads, positions, pages, sub_keys]`` -> the largest share of any position, ``[heads, pages]``."""
    return logits.flatten(2).softmax(dim=-1).view_as(logits).sum(dim=-1).amax(dim=1)


def _page_score_triton(queries, table, pages, key_of_head) -> torch.Tensor:
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
        _page_score_kernel[(blocks, heads, voter_blocks)](
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
def _page_score_kernel(
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
