"""Merging attention states: Triton against its torch references; see ``triton_cases``."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, FLOATS, NAN, assert_same, random

from sglang_lsa.kernels.merge_shared import _merge_shared_triton, merge_shared_reference
from sglang_lsa.kernels.merge_states import _merge_states_triton, merge_states_reference

# --- merge_states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(0, 2, 8), (1, 1, 1), (63, 9, 64), (5, 32, 128), (17, 3, 80)])
def test_merge_states(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    """Some rows have no keys yet, some parts none at all, some neither."""
    out, part = random(tokens, heads, dim), random(tokens, heads, dim, dtype=dtype, seed=1)
    lse, part_lse = 20 * random(tokens, heads, seed=2), 20 * random(tokens, heads, seed=3)
    for gone, state in ((lse, out), (part_lse, part)):
        nothing = random(tokens, heads, seed=4 if gone is lse else 5) > 1
        gone[nothing] = float("-inf")
        state[nothing] = 0
    expected_out, expected_lse = out.cpu().clone(), lse.cpu().clone()
    merge_states_reference(expected_out, expected_lse, part.cpu(), part_lse.cpu())
    _merge_states_triton(out, lse, part, part_lse)
    torch.testing.assert_close(out.cpu(), expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-5, atol=1e-4)


# --- merge_shared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(0, 2, 8), (1, 1, 1), (7, 9, 64), (5, 32, 128), (17, 3, 80)])
def test_merge_shared(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    """Some tokens are in no group, rows that nobody is at hold NaN, and a group may have read nothing."""
    out, part = random(tokens, heads, dim, dtype=dtype), random(tokens, heads, dim, dtype=dtype, seed=1)
    lse, part_lse = 20 * random(tokens, heads, seed=2), 20 * random(tokens, heads, seed=3)
    members = torch.randperm(tokens, generator=torch.Generator().manual_seed(4))[: tokens - tokens // 3]
    places = torch.full((tokens,), -1, dtype=torch.int64)
    places[members] = torch.arange(len(members))
    for state in (part, part_lse):
        state[len(members) :] = NAN
    part_lse[:1] = float("-inf")
    places = places.to(DEVICE)
    expected = out.clone()
    merge_shared_reference(expected, lse, part, part_lse, places)
    before = out.clone()
    _merge_shared_triton(out, lse, part, part_lse, places)
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=FLOATS[dtype])
    assert_same(out[places < 0], before[places < 0])
