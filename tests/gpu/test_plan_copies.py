"""Plans of FlashInfer that are made while the GPU is behind, as it is where other processes have it by turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

from sglang_lsa.attend.plan_copies import PlanCopies

PAGE, HEADS, KV_HEADS, DIM = 64, 8, 2, 64
POOL = 512
MANY, FEW = (120, 90), (3, 2)
"""Pages of two requests."""
BEHIND = 2_000_000_000
"""Clock cycles, about a second."""


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_step_reads_by_its_own_plan(kind: str) -> None:
    """The second plan is asked for while the first one's copy still waits in the stream. Without :class:`PlanCopies`
    the first step reads by the second's plan: here less than it should, and with lengths the other way round memory
    beyond its own."""
    draw = torch.Generator(device="cuda").manual_seed(0)
    pool = torch.randn(POOL, 2, PAGE, KV_HEADS, DIM, generator=draw, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(2, HEADS, DIM, generator=draw, device="cuda", dtype=torch.bfloat16)
    indices = torch.randperm(POOL, generator=torch.Generator().manual_seed(0)).int().cuda()
    workspace = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    wrapper = make(kind, workspace)
    copies = PlanCopies()

    def plan(sizes: tuple[int, ...]) -> None:
        with copies.planning(wrapper):
            tell(kind, wrapper, sizes, indices[: sum(sizes)])

    def alone(sizes: tuple[int, ...]) -> torch.Tensor:
        plan(sizes)
        out = wrapper.run(q, pool)
        torch.cuda.synchronize()
        return out

    wanted = [alone(sizes) for sizes in (MANY, FEW)]
    torch.cuda._sleep(BEHIND)
    found = []
    for sizes in (MANY, FEW):
        plan(sizes)
        found.append(wrapper.run(q, pool))
    torch.cuda.synchronize()
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=0)
    assert not torch.equal(*wanted)


def make(kind: str, workspace: torch.Tensor) -> Any:
    made = BatchDecodeWithPagedKVCacheWrapper if kind == "decode" else BatchPrefillWithPagedKVCacheWrapper
    return made(workspace, "NHD", backend="fa2")


def tell(kind: str, wrapper: Any, sizes: tuple[int, ...], indices: torch.Tensor) -> None:
    """One query of each request, which reads so many whole pages."""
    pages = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).int()
    last = torch.full((len(sizes),), PAGE, dtype=torch.int32)
    shape = HEADS, KV_HEADS, DIM, PAGE
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    if kind == "decode":
        wrapper.plan(pages, indices, last, *shape, **types)
    else:
        queries = torch.arange(len(sizes) + 1, dtype=torch.int32)
        wrapper.plan(queries, pages, indices, last, *shape, **types)
