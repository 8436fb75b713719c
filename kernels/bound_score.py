"""bound_score: the most that the next tokens could attend to each page, by bounds of its keys (Quest)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lsa.kernels.page_score import ENDLESS, PAGES_AT_ONCE, SPAN, Ragged

MANY_PAGES = 8192
"""Above this, the kernel takes pages in larger blocks."""


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
    _fit(queries.shape, table)
    if len(queries) == 0 or len(pages) == 0:
        return torch.zeros(len(pages), dtype=torch.float32, device=table.device)
    return (_bound_score_triton if table.is_cuda else bound_score_reference)(queries, table, pages, scale)


def bound_scores(ring: torch.Tensor, table: torch.Tensor, asked: Ragged, scale: float) -> torch.Tensor:
    """:func:`bound_score` of several requests in one call: each gets the scores that it would get alone, bit for bit.

    Args:
        ring: ``[rows, places, layers, q_heads, head_dim]``, contiguous; recent post-RoPE queries of each row.
        table: as for :func:`bound_score`.
        asked: the requests, their places in the ring and their pages.
        scale: the model's softmax scale.

    Returns:
        ``[pages]`` float32 in [0, 1], one request after the other.

    Raises:
        ValueError: the heads of queries and keys do not fit.
    """
    _fit(ring.shape[1:], table)
    if not len(asked.pages):
        return torch.zeros(0, dtype=torch.float32, device=table.device)
    return (_bound_scores_triton if table.is_cuda else bound_scores_reference)(ring, table, asked, scale)


def bound_scores_reference(ring, table, asked, scale) -> torch.Tensor:
    """See :func:`bound_scores`."""
    return torch.cat([bound_score(asked.recent(ring, i), table, asked.pages_of(i), scale) for i in range(len(asked))])


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


def _fit(queries: torch.Size, table: torch.Tensor) -> None:
    _, layers, q_heads, head_dim = queries
    if q_heads % table.shape[3] or table.shape[1] != layers or table.shape[4] != head_dim:
        raise ValueError(f"queries {tuple(queries)} do not fit key bounds {tuple(table.shape)}")


def _bound_score_triton(queries, table, pages, scale) -> torch.Tensor:
    places = triton.next_power_of_2(len(queries))  # so few kernels are compiled, whatever positions there are
    ring = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, 0, 0, places - len(queries)))[None].contiguous()
    return _bound_scores_triton(ring, table, Ragged.alone(len(queries), pages), scale)


def _bound_scores_triton(ring, table, asked, scale) -> torch.Tensor:
    _, places, layers, q_heads, head_dim = ring.shape
    kv_heads = table.shape[3]
    group = q_heads // kv_heads
    voters = places * group
    # By the ring and by a request's own pages, not by who else is scored: else sums would be made in another order.
    block_voters = max(16, min(128, triton.next_power_of_2(voters)))
    voter_blocks = triton.cdiv(voters, block_voters)
    heads, width = layers * kv_heads, voter_blocks * block_voters
    scores = torch.zeros(len(asked.pages), dtype=torch.float32, device=table.device)
    for block_pages, least, most in ((64, 1, MANY_PAGES), (128, MANY_PAGES + 1, ENDLESS)):
        for _, blocks, part in asked.parts(block_pages, heads * 2 * width * 4, least, most):
            partial = torch.empty((len(part), heads, 2, blocks, width), dtype=torch.float32, device=table.device)
            for last in (False, True):
                _bound_score_kernel[(blocks, heads, len(part) * voter_blocks)](
                    ring,
                    table,
                    part.pages,
                    part.spans,
                    partial,
                    scores,
                    scale,
                    least,
                    most,
                    blocks,
                    PLACES=places,
                    LAYERS=layers,
                    KV_HEADS=kv_heads,
                    GROUP=group,
                    DIM=head_dim,
                    VOTERS=width,
                    BLOCK_VOTERS=block_voters,
                    BLOCK_PAGES=block_pages,
                    BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)),
                    SPAN=SPAN,
                    PRECISE=ring.dtype == torch.float32,
                    LAST=last,
                )
    return scores


# One compilation serves every context length, so that none happens while serving.
@triton.jit(
    do_not_specialize=["scale", "least", "most_pages", "most_blocks"], do_not_specialize_on_alignment=["pages", "spans"]
)
def _bound_score_kernel(
    ring,  # [rows, PLACES, LAYERS, KV_HEADS * GROUP, DIM]
    table,  # [virtual_pages + 1, LAYERS, 2, KV_HEADS, DIM]
    pages,  # int64 [pages of all requests]
    spans,  # int64 [requests, SPAN] of Ragged
    partial,  # float32 [requests, LAYERS * KV_HEADS, 2, blocks, VOTERS]: maximum, and sum of exponentials, of a block
    scores,  # float32 [pages of all requests], zeros at first
    scale,
    least,
    most_pages,  # requests with so many pages are scored, and no others
    most_blocks,
    PLACES: tl.constexpr,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VOTERS: tl.constexpr,
    BLOCK_VOTERS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISE: tl.constexpr,
    LAST: tl.constexpr,  # first launch: what a softmax over pages needs; second: the scores
):
    block = tl.program_id(0)
    layer = tl.program_id(1) // KV_HEADS
    head = tl.program_id(1) % KV_HEADS
    request = tl.program_id(2) // (VOTERS // BLOCK_VOTERS)
    span = spans + request * SPAN
    start, n = tl.load(span + 3), tl.load(span + 4)
    if (n < least) | (n > most_pages) | (block * BLOCK_PAGES >= n):
        return
    blocks = (n + BLOCK_PAGES - 1) // BLOCK_PAGES
    voter = tl.program_id(2) % (VOTERS // BLOCK_VOTERS) * BLOCK_VOTERS + tl.arange(0, BLOCK_VOTERS)
    index = block * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    d = tl.arange(0, BLOCK_DIM)
    votes = voter < tl.load(span + 2) * GROUP  # a position, and a head of this group
    place = tl.load(span) * PLACES + (tl.load(span + 1) + voter // GROUP) % PLACES
    row = place * LAYERS + layer
    q_at = ring + (row * KV_HEADS * GROUP + head * GROUP + voter % GROUP)[:, None] * DIM + d[None, :]
    q = tl.load(q_at, mask=votes[:, None] & (d < DIM)[None, :], other=0.0)
    page = tl.load(pages + start + index, mask=index < n, other=0)
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
    heads = LAYERS * KV_HEADS
    maxima = partial + (request.to(tl.int64) * heads + tl.program_id(1)) * 2 * most_blocks * VOTERS + voter
    sums = maxima + most_blocks * VOTERS
    if LAST:
        most = tl.load(maxima)
        for other in range(1, blocks):
            most = tl.maximum(most, tl.load(maxima + other * VOTERS))
        total = tl.zeros_like(most)
        for other in range(blocks):
            total += tl.load(sums + other * VOTERS) * tl.exp(tl.load(maxima + other * VOTERS) - most)
        share = tl.exp(logits - most[:, None]) / total[:, None]
        best = tl.max(tl.where(votes[:, None], share, 0.0), axis=0)
        tl.atomic_max(scores + start + index, best, mask=index < n)
    else:
        most = tl.max(logits, axis=1)
        tl.store(maxima + block * VOTERS, most)
        tl.store(sums + block * VOTERS, tl.sum(tl.exp(logits - most[:, None]), axis=1))
