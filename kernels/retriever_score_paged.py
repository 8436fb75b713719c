"""retriever_score_paged: what each page of DeepSeek-V4's compressed index keys is worth to some queries.

A page has 64 keys, four tokens each. As SGLang's pool keeps it, that is 64 x 128 numbers in fp8 (e4m3), then 64 float32
by which they are multiplied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lsa.kernels.page_score import from_8_bits_kernel

DIM = 128
ENTRIES = 64
"""Compressed keys of a page."""
VALUES = ENTRIES * DIM
"""Bytes of a page before its scales."""
ROW = VALUES + ENTRIES * 4
"""Bytes of a page."""
PAGES_AT_ONCE = 256
"""Pages whose logits the torch reference holds in memory at a time."""
PAGES_OF_PROGRAM, TOKENS_OF_PROGRAM = 2, 8


def retriever_score_paged(
    queries: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, pages: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """How well the best key of each page answers each query, and how many of its keys answer it well enough.

    ``logit[t, key] = scale[key] * sum_h weights[t, h] * relu(queries[t, h] . number[key])``

    Args:
        queries: ``[tokens, heads, 128]``, rotated and transformed; floats, or uint8 that are fp8 (e4m3).
        weights: ``[tokens, heads]`` floats; with fp8 queries their scales are in them.
        table: uint8 ``[rows, 8448]``, contiguous, a page in each row.
        pages: int64 ``[n]`` rows of the table, all of their keys there.
        threshold: a key counts whose logit is above this.

    Returns:
        The largest logit of each page, and how many are above the threshold: ``[tokens, n]`` float32 each, or float64
        when the queries are.

    Raises:
        ValueError: the shapes or types are others.

    Source: arXiv 2606.09079, section 3; the layout is that of SGLang's pool of index keys.
    """
    if table.dtype != torch.uint8 or table.dim() != 2 or table.shape[1] != ROW or not table.is_contiguous():
        raise ValueError(f"index keys are {table.dtype} {tuple(table.shape)}: use contiguous uint8 [pages, {ROW}]")
    if queries.dim() != 3 or queries.shape[-1] != DIM or weights.shape != queries.shape[:2]:
        raise ValueError(f"queries {tuple(queries.shape)} and weights {tuple(weights.shape)} do not fit each other")
    if not queries.is_floating_point() and queries.dtype != torch.uint8:
        raise ValueError(f"queries are {queries.dtype}: use floats, or fp8 (e4m3) as uint8")
    if not len(queries) or not len(pages):
        best = torch.zeros((len(queries), len(pages)), device=table.device)
        return best, best.clone()
    score = _retriever_score_paged_triton if table.is_cuda else retriever_score_paged_reference
    return score(queries, weights, table, pages, threshold)


def pack_pages(keys: torch.Tensor) -> torch.Tensor:
    """Quantise ``[n, 64, 128]`` to rows of a table, uint8 ``[n, 8448]``; each key's largest number becomes fp8's."""
    scale = keys.float().abs().amax(dim=2).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    numbers = (keys.float() / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat((numbers.flatten(1), scale.contiguous().view(torch.uint8)), dim=1)


def unpack_pages(rows: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers ``[n, 64, 128]`` and scales ``[n, 64]`` of rows of a table."""
    numbers = rows[:, :VALUES].contiguous().view(torch.float8_e4m3fn).to(dtype)
    return numbers.view(-1, ENTRIES, DIM), rows[:, VALUES:].contiguous().view(torch.float32).to(dtype)


def entry_logits(queries: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``logit`` of :func:`retriever_score_paged` for every key of some rows, ``[tokens, n, 64]``."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    numbers, scales = unpack_pages(rows, dtype)
    products = torch.einsum("thd,nkd->thnk", _floats(queries).to(dtype), numbers).relu_()
    return torch.einsum("thnk,th->tnk", products, weights.to(dtype)) * scales


def retriever_score_paged_reference(queries, weights, table, pages, threshold=0.0):
    """See :func:`retriever_score_paged`."""
    logits = [entry_logits(queries, weights, table[block]) for block in pages.split(PAGES_AT_ONCE)]
    best = torch.cat([part.amax(dim=2) for part in logits], dim=1)
    return best, torch.cat([(part > threshold).sum(dim=2) for part in logits], dim=1).to(best.dtype)


def _floats(queries: torch.Tensor) -> torch.Tensor:
    """Numbers of fp8 are numbers of fp16, too."""
    if queries.dtype == torch.uint8:
        queries = queries.contiguous().view(torch.float8_e4m3fn)
    return queries.half() if queries.dtype == torch.float8_e4m3fn else queries


def _retriever_score_paged_triton(queries, weights, table, pages, threshold=0.0):
    tokens, heads, _ = queries.shape
    n = len(pages)
    found = torch.empty((2, tokens, n), dtype=torch.float32, device=table.device)
    queries = _floats(queries).contiguous()
    grid = (triton.cdiv(n, PAGES_OF_PROGRAM), triton.cdiv(tokens, TOKENS_OF_PROGRAM))
    _retriever_score_paged_kernel[grid](
        queries,
        weights.float().contiguous(),
        table,
        table.view(torch.float32),
        pages,
        found,
        float(threshold),
        n,
        tokens,
        HEADS=heads,
        PAGES=PAGES_OF_PROGRAM,
        TOKENS=TOKENS_OF_PROGRAM,
        BLOCK_HEADS=max(16, min(64, triton.next_power_of_2(heads))),
        num_warps=4,
    )
    return found[0], found[1]


@triton.jit(do_not_specialize=["threshold", "n", "tokens"], do_not_specialize_on_alignment=["pages"])
def _retriever_score_paged_kernel(
    queries,  # [tokens, HEADS, 128]
    weights,  # float32 [tokens, HEADS]
    table,  # uint8 [rows, 8448]
    scales,  # the same bytes as float32 [rows, 2112]
    pages,  # int64 [n]
    found,  # float32 [2, tokens, n]: largest logit, number of those above the threshold
    threshold,
    n,
    tokens,
    HEADS: tl.constexpr,
    PAGES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    key = tl.arange(0, PAGES * 64)
    index = tl.program_id(0) * PAGES + key // 64
    d = tl.arange(0, 128)
    row = tl.load(pages + index, mask=index < n, other=0)
    bits = tl.load(table + (row * 8448 + key % 64 * 128)[:, None] + d[None, :]).to(tl.int32)
    numbers = from_8_bits_kernel(bits).to(queries.dtype.element_ty)  # [PAGES * 64, 128]
    scale = tl.load(scales + row * 2112 + 2048 + key % 64)
    at = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    first = tl.program_id(1) * TOKENS
    for token in range(first, tl.minimum(first + TOKENS, tokens)):
        total = tl.zeros((PAGES * 64,), dtype=tl.float32)
        for head in range(0, HEADS, BLOCK_HEADS):
            h = head + tl.arange(0, BLOCK_HEADS)
            there = h < HEADS
            of_head = token * HEADS + h
            q = tl.load(queries + of_head[None, :] * 128 + d[:, None], mask=there[None, :], other=0.0)
            products = tl.dot(numbers, q, input_precision="ieee")  # [PAGES * 64, BLOCK_HEADS]
            weight = tl.load(weights + of_head, mask=there, other=0.0)
            total += tl.sum(tl.where(products > 0, products, 0.0) * weight[None, :], axis=1)
        logits = tl.reshape(total * scale, (PAGES, 64))
        place = found + token * n + at
        tl.store(place, tl.max(logits, axis=1), mask=at < n)
        over = tl.sum(tl.where(logits > threshold, 1.0, 0.0), axis=1)
        tl.store(place + tokens * n, over, mask=at < n)
