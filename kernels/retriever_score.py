"""retriever_score: FlashMemory's retriever over the compressed keys of DeepSeek-V4's indexer, four tokens a key."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lsa.kernels.page_score import from_8_bits_kernel

DIM = 128
KEY_BYTES = 132
"""Of a compressed key: 128 numbers in fp8 (e4m3), and a float32 by which they are multiplied."""
KEYS_AT_ONCE = 4096
"""Keys whose products the torch reference holds in memory at a time."""


def retriever_score(queries: torch.Tensor, weights: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """``logit[b, n] = sum_h weights[b, h] * relu(queries[b, h] . key[n])``.

    Args:
        queries: ``[batch, heads, 128]``, rotated and transformed, see ``sglang_lsa.indexer.flashmemory``.
        weights: ``[batch, heads]``.
        packed: uint8 ``[keys, 132]``, contiguous.

    Returns:
        ``[batch, keys]`` float32, or float64 when the queries are.

    Raises:
        ValueError: the shapes or types are others.

    Source: arXiv 2606.09079, section 3, and the layout of its released code.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != KEY_BYTES or not packed.is_contiguous():
        raise ValueError(
            f"packed keys are {packed.dtype} {tuple(packed.shape)}: use contiguous uint8 [keys, {KEY_BYTES}]"
        )
    if queries.shape[-1] != DIM or weights.shape != queries.shape[:2]:
        raise ValueError(f"queries {tuple(queries.shape)} and weights {tuple(weights.shape)} do not fit each other")
    if not len(packed) or not len(queries):
        return torch.zeros((len(queries), len(packed)), device=packed.device)
    return (_retriever_score_triton if packed.is_cuda else retriever_score_reference)(queries, weights, packed)


def pack_keys(keys: torch.Tensor) -> torch.Tensor:
    """Quantise ``[keys, 128]`` to the packed form; each key's largest number becomes fp8's."""
    scale = keys.float().abs().amax(dim=1).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    numbers = (keys.float() / scale[:, None]).to(torch.float8_e4m3fn)
    return torch.cat((numbers.view(torch.uint8), scale[:, None].contiguous().view(torch.uint8)), dim=1)


def unpack_keys(packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[keys, 132]`` -> ``[keys, 128]``."""
    numbers = packed[:, :DIM].contiguous().view(torch.float8_e4m3fn).to(dtype)
    return numbers * packed[:, DIM:].contiguous().view(torch.float32).to(dtype)


def retriever_score_reference(queries, weights, packed) -> torch.Tensor:
    """See :func:`retriever_score`."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = []
    for block in packed.split(KEYS_AT_ONCE):
        products = torch.einsum("bhd,nd->bhn", queries.to(dtype), unpack_keys(block, dtype)).relu_()
        scores.append(torch.einsum("bhn,bh->bn", products, weights.to(dtype)))
    return torch.cat(scores, dim=1)


def _retriever_score_triton(queries, weights, packed) -> torch.Tensor:
    batch, heads, _ = queries.shape
    n = len(packed)
    logits = torch.empty((batch, n), dtype=torch.float32, device=packed.device)
    _retriever_score_kernel[(triton.cdiv(n, 64), batch)](
        queries.float().contiguous(),
        weights.float().contiguous(),
        packed,
        packed.view(torch.float32),
        logits,
        n,
        HEADS=heads,
        BLOCK_KEYS=64,
        BLOCK_HEADS=max(16, min(64, triton.next_power_of_2(heads))),
    )
    return logits


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["packed", "scales"])
def _retriever_score_kernel(
    queries,  # float32 [batch, HEADS, 128]
    weights,  # float32 [batch, HEADS]
    packed,  # uint8 [n, 132]
    scales,  # the same bytes as float32 [n, 33]
    logits,  # float32 [batch, n]
    n,
    HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    d = tl.arange(0, 128)
    real = index < n
    at = index.to(tl.int64)
    bits = tl.load(packed + at[:, None] * 132 + d[None, :], mask=real[:, None], other=0).to(tl.int32)
    numbers = from_8_bits_kernel(bits)
    scale = tl.load(scales + at * 33 + 32, mask=real, other=0.0)
    total = tl.zeros((BLOCK_KEYS,), dtype=tl.float32)
    for first in range(0, HEADS, BLOCK_HEADS):
        h = first + tl.arange(0, BLOCK_HEADS)
        there = h < HEADS
        q_at = queries + (batch * HEADS + h)[None, :] * 128 + d[:, None]
        q = tl.load(q_at, mask=there[None, :], other=0.0)
        products = tl.dot(numbers, q, input_precision="ieee") * scale[:, None]  # [BLOCK_KEYS, BLOCK_HEADS]
        weight = tl.load(weights + batch * HEADS + h, mask=there, other=0.0)
        total += tl.sum(tl.where(products > 0, products, 0.0) * weight[None, :], axis=1)
    tl.store(logits + batch * n + index, total, mask=real)
