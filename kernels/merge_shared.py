"""merge_shared: attention over a request's own pages, and over pages that were read for its whole group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def merge_shared(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, places: torch.Tensor
) -> None:
    """Let ``out`` become attention over both sets of keys, where there are both.

    Computed in float32 and rounded once. Rows of ``part`` that nobody is at are not looked at.

    Args:
        out: ``[tokens, heads, head_dim]`` of any float type, contiguous, changed in place: attention to own pages.
        lse: float32 ``[tokens, heads]``, contiguous, base-2 logarithms (FlashInfer's): of the same. Finite.
        part: ``[rows, heads, head_dim]`` of any float type, contiguous: attention to the pages that are read together,
            for the members of all groups, one after the other.
        part_lse: float32 ``[rows, heads]``, contiguous: of the same; -inf where there are no keys.
        places: int64 ``[tokens]``, the row of ``part`` of each token; -1 for one that is in no group.

    Raises:
        ValueError: the shapes do not fit, or something is not contiguous.

    Source: as for ``merge_states``.
    """
    if out.shape[1:] != part.shape[1:] or lse.shape != out.shape[:2] or part_lse.shape != part.shape[:2]:
        raise ValueError(
            f"states {tuple(out.shape)} with {tuple(lse.shape)} and {tuple(part.shape)} with {tuple(part_lse.shape)} "
            "cannot be merged: shape them [tokens, heads, head_dim] and [tokens, heads]"
        )
    if places.shape != out.shape[:1]:
        raise ValueError(f"{tuple(places.shape)} places for {out.shape[0]} tokens: give one for each")
    if not all(t.is_contiguous() for t in (out, lse, part, part_lse, places)):
        raise ValueError("states that are merged must be contiguous")
    (_merge_shared_triton if out.is_cuda else merge_shared_reference)(out, lse, part, part_lse, places)


def merge_shared_reference(out, lse, part, part_lse, places) -> None:
    """See :func:`merge_shared`."""
    here = (places >= 0).nonzero().squeeze(1)
    there = places[here]
    ours, theirs = lse[here], part_lse[there]
    most = torch.maximum(ours, theirs)
    ours, theirs = torch.exp2(ours - most), torch.exp2(theirs - most)
    total = ours + theirs
    merged = out[here].float() * (ours / total)[..., None] + part[there].float() * (theirs / total)[..., None]
    out[here] = merged.to(out.dtype)


def _merge_shared_triton(out, lse, part, part_lse, places) -> None:
    tokens, heads, dim = out.shape
    if tokens:
        _merge_shared_kernel[(tokens, triton.cdiv(heads, HEADS))](
            out,
            lse,
            part,
            part_lse,
            places,
            heads,
            DIM=dim,
            BLOCK_DIM=triton.next_power_of_2(dim),
            BLOCK_HEADS=HEADS,
        )


HEADS = 16


@triton.jit(do_not_specialize=["heads"])
def _merge_shared_kernel(
    out,  # [tokens, heads, DIM]
    lse,  # float32 [tokens, heads]
    part,  # [rows, heads, DIM]
    part_lse,  # float32 [rows, heads]
    places,  # int64 [tokens]
    heads,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token).to(tl.int64)
    if place >= 0:
        head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        d = tl.arange(0, BLOCK_DIM)
        real = head < heads
        inside = real[:, None] & (d < DIM)[None, :]
        ours = tl.load(lse + token * heads + head, mask=real, other=0.0)
        theirs = tl.load(part_lse + place * heads + head, mask=real, other=0.0)
        most = tl.maximum(ours, theirs)
        a = tl.exp2(ours - most)
        b = tl.exp2(theirs - most)
        at = head[:, None] * DIM + d[None, :]
        own = tl.load(out + token * heads * DIM + at, mask=inside, other=0.0).to(tl.float32)
        shared = tl.load(part + place * heads * DIM + at, mask=inside, other=0.0).to(tl.float32)
        merged = own * (a / (a + b))[:, None] + shared * (b / (a + b))[:, None]
        tl.store(out + token * heads * DIM + at, merged.to(out.dtype.element_ty), mask=inside)
