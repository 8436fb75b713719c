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


def page_score(queries: torch.Tensor, weights: torch.Tensor, page_keys: torch.Tensor) -> torch.Tensor:
    """Logits of the memory indexer for one observed layer.

    ``logit[p] = max over positions t and sub-keys s of sum_h weights[t, h] * relu(queries[t, h] . page_keys[p, s])``.

    Args:
        queries: ``[positions, heads, dim]`` from the query tower.
        weights: ``[positions, heads]`` per-head weights from the same tower.
        page_keys: ``[pages, sub_keys, dim]`` from the key tower; on a GPU, queries are multiplied in its type.

    Returns:
        ``[pages]`` float32; all -inf when there are no positions.

    Source: arXiv 2606.09079, section 3 (a chunk there has one key; here a page has several).
    """
    pages, _, dim = page_keys.shape
    if queries.shape[-1] != dim:
        raise ValueError(f"queries {tuple(queries.shape)} do not fit page keys {tuple(page_keys.shape)}")
    if not pages or not len(queries):
        return torch.full((pages,), float("-inf"), device=page_keys.device)
    return (_page_score_triton if page_keys.is_cuda else page_score_reference)(queries, weights, page_keys)


def page_score_reference(queries, weights, page_keys) -> torch.Tensor:
    """See :func:`page_score`."""
    products = torch.einsum("thd,psd->tpsh", queries.float(), page_keys.float()).relu_()
    return torch.einsum("tpsh,th->tps", products, weights.float()).amax(dim=(0, 2))


def _page_score_triton(queries, weights, page_keys) -> torch.Tensor:
    pages, sub_keys, dim = page_keys.shape
    positions, heads, _ = queries.shape
    keys = page_keys.reshape(pages * sub_keys, dim)
    logits = torch.empty(len(keys), dtype=torch.float32, device=keys.device)
    _page_score_kernel[(triton.cdiv(len(keys), 64),)](
        queries.to(keys.dtype).contiguous(),
        weights.float().contiguous(),
        keys.contiguous(),
        logits,
        len(keys),
        positions,
        HEADS=heads,
        DIM=dim,
        BLOCK_KEYS=64,
        BLOCK_HEADS=max(16, triton.next_power_of_2(heads)),
        BLOCK_DIM=max(16, triton.next_power_of_2(dim)),
    )
    return logits.view(pages, sub_keys).amax(dim=1)


@triton.jit(do_not_specialize=["n", "positions"], do_not_specialize_on_alignment=["keys"])
def _page_score_kernel(
    queries,  # [positions, HEADS, DIM]
    weights,  # float32 [positions, HEADS]
    keys,  # [n, DIM]
    logits,  # float32 [n]
    n,
    positions,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    h = tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_DIM)
    key = tl.load(
        keys + index.to(tl.int64)[:, None] * DIM + d[None, :], mask=(index < n)[:, None] & (d < DIM)[None, :], other=0.0
    )
    best = tl.full((BLOCK_KEYS,), float("-inf"), dtype=tl.float32)
    for t in range(positions):
        query_at = queries + (t * HEADS + h)[None, :] * DIM + d[:, None]
        query = tl.load(query_at, mask=(h < HEADS)[None, :] & (d < DIM)[:, None], other=0.0)
        products = tl.dot(key, query, input_precision="ieee")  # [BLOCK_KEYS, BLOCK_HEADS]
        weight = tl.load(weights + t * HEADS + h, mask=h < HEADS, other=0.0)
        best = tl.maximum(best, tl.sum(tl.where(products > 0, products, 0.0) * weight[None, :], axis=1))
    tl.store(logits + index, best, mask=index < n)
