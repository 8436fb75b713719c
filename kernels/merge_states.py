"""merge_states: attention over a set of keys from attention over its parts, by their log-sum-exps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


def base_2(lse: torch.Tensor) -> torch.Tensor:
    """Log-sum-exps as FlashAttention returns them, as :func:`merge_states` takes them.

    Args:
        lse: float32 ``[heads, tokens]``, natural logarithms; infinite, of either sign, where there were no keys.

    Returns:
        float32 ``[tokens, heads]``, contiguous, base-2 logarithms; -inf where there were no keys.
    """
    return torch.where(lse == float("inf"), float("-inf"), lse * LOG2_E).T.contiguous()


def merge_states(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Add attention over more keys to what is there: ``out`` and ``lse`` become those over both sets of keys.

    The sum is kept in float32: a prefix of many blocks is rounded once, at the end, as one of a single block is.

    Args:
        out: float32 ``[tokens, heads, head_dim]``, contiguous, changed in place.
        lse: float32 ``[tokens, heads]``, contiguous, base-2 logarithms (FlashInfer's), changed in place; -inf where
            there were no keys yet.
        part, part_lse: the same over the other keys, of any float type; -inf where there are none.

    Raises:
        ValueError: the shapes do not fit, or ``out`` is not float32.

    Source: the online softmax, Milakov and Gimelshein 2018; FlashInfer calls it the recursive attention.
    """
    if out.shape != part.shape or lse.shape != part_lse.shape or out.shape[:2] != lse.shape:
        raise ValueError(
            f"states {tuple(out.shape)} with {tuple(lse.shape)} and {tuple(part.shape)} with {tuple(part_lse.shape)} "
            "cannot be merged: shape them [tokens, heads, head_dim] and [tokens, heads]"
        )
    if out.dtype != torch.float32 or lse.dtype != torch.float32:
        raise ValueError(f"the running state is {out.dtype} with {lse.dtype}: keep it in float32")
    (_merge_states_triton if out.is_cuda else merge_states_reference)(out, lse, part, part_lse)


def merge_states_reference(out, lse, part, part_lse) -> None:
    """See :func:`merge_states`."""
    most = torch.maximum(lse, part_lse)
    shift = torch.where(most.isinf(), torch.zeros_like(most), most)
    ours, theirs = torch.exp2(lse - shift), torch.exp2(part_lse.float() - shift)
    total = ours + theirs
    scale = torch.where(total > 0, 1 / total, torch.zeros_like(total))
    out.mul_((ours * scale)[..., None]).add_(part.float() * (theirs * scale)[..., None])
    lse.copy_(shift + torch.log2(total))


def _merge_states_triton(out, lse, part, part_lse) -> None:
    tokens, heads, dim = out.shape
    part, part_lse = part.contiguous(), part_lse.contiguous()
    if not (out.is_contiguous() and lse.is_contiguous()):
        raise ValueError(f"running state with strides {out.stride()} and {lse.stride()} is not contiguous")
    if tokens:
        _merge_states_kernel[(triton.cdiv(tokens * heads, ROWS),)](
            out,
            lse,
            part,
            part_lse,
            tokens * heads,
            DIM=dim,
            BLOCK_DIM=triton.next_power_of_2(dim),
            BLOCK_ROWS=ROWS,
        )


ROWS = 16


@triton.jit(do_not_specialize=["n"])
def _merge_states_kernel(
    out,  # float32 [n, DIM]
    lse,  # float32 [n]
    part,  # [n, DIM]
    part_lse,  # float32 [n]
    n,  # tokens * heads
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    real = row < n
    inside = real[:, None] & (d < DIM)[None, :]
    ours = tl.load(lse + row, mask=real, other=float("-inf"))
    theirs = tl.load(part_lse + row, mask=real, other=float("-inf")).to(tl.float32)
    most = tl.maximum(ours, theirs)
    shift = tl.where(most == float("-inf"), 0.0, most)
    a = tl.exp2(ours - shift)
    b = tl.exp2(theirs - shift)
    total = a + b
    scale = tl.where(total > 0, 1 / total, 0.0)
    at = row[:, None] * DIM + d[None, :]
    old = tl.load(out + at, mask=inside, other=0.0)
    new = tl.load(part + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, old * (a * scale)[:, None] + new * (b * scale)[:, None], mask=inside)
    tl.store(lse + row, shift + tl.log2(total), mask=real)
