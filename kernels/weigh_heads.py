"""weigh_heads: what several heads say of each page, in one number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAGES_OF_PROGRAM = 256


def weigh_heads(shares: torch.Tensor, weights: torch.Tensor, divisor: float) -> torch.Tensor:
    """The weighted sum over heads, divided.

    That of a page does not depend on how many there are, bit for bit, as that of a matrix product may.

    Args:
        shares: float32 ``[heads, pages]``.
        weights: float32 ``[heads]``.

    Returns:
        float32 ``[pages]``.

    Raises:
        ValueError: another number of heads.
    """
    if len(shares) != len(weights):
        raise ValueError(f"{len(weights)} weights for shares {tuple(shares.shape)}: give one to each head")
    return (_weigh_heads_triton if shares.is_cuda else weigh_heads_reference)(shares, weights, divisor)


def weigh_heads_reference(shares, weights, divisor) -> torch.Tensor:
    """See :func:`weigh_heads`."""
    total = torch.zeros_like(shares[0]) if len(shares) else torch.zeros(shares.shape[1], device=shares.device)
    for weight, of_head in zip(weights, shares, strict=True):
        total += weight * of_head
    return total / divisor


def _weigh_heads_triton(shares, weights, divisor) -> torch.Tensor:
    heads, pages = shares.shape
    found = torch.empty(pages, dtype=torch.float32, device=shares.device)
    if pages:
        _weigh_heads_kernel[(triton.cdiv(pages, PAGES_OF_PROGRAM),)](
            shares.contiguous(), weights.contiguous(), found, float(divisor), pages, HEADS=heads, BLOCK=PAGES_OF_PROGRAM
        )
    return found


@triton.jit(do_not_specialize=["divisor", "pages"])
def _weigh_heads_kernel(
    shares,  # float32 [HEADS, pages]
    weights,  # float32 [HEADS]
    found,  # float32 [pages]
    divisor,
    pages,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    page = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(HEADS):
        share = tl.load(shares + tl.cast(head, tl.int64) * pages + page, mask=page < pages, other=0.0)
        total += tl.load(weights + head) * share
    tl.store(found + page, total / divisor, mask=page < pages)
