"""attend in groups on a GPU: plans, static buffers, and what a CUDA graph reads from them.

FlashInfer itself needs a GPU (``tests/gpu/test_groups.py``, the same steps); what stands in for its wrapper here reads
the same buffers, and refuses what it refuses.
"""

from __future__ import annotations

import pytest
import torch
from read_together import HEADS, ONE, POOL, TWO, Steps, grouping_of, in_turns

from sglang_lsa.attend.together import Plan, rows_of
from sglang_lsa.attend.torch_native import attend_part
from sglang_lsa.config import PAGE_SIZE as PAGE
from sglang_lsa.engine.group_buffers import INT_WORKSPACE, KV_LENGTHS, PAST_THE_END, planning_bytes, room_for
from sglang_lsa.engine.groups import MOST_GROUPS
from sglang_lsa.engine.step import captured

NAN = float("nan")


class Wrapper:
    """FlashInfer's ``BatchPrefillWithPagedKVCacheWrapper`` as far as it is used: what it computes depends on its
    buffers alone, and in CUDA graph mode these stay where they are."""

    def __init__(self, floats: torch.Tensor, use_cuda_graph: bool = False, **buffers: torch.Tensor):
        self.graph, self.buffers, self.most, self.plans = use_cuda_graph, buffers, 0, 0
        self.calls = 0

    def reset_workspace_buffer(self, floats: torch.Tensor, ints: torch.Tensor) -> None:
        self.workspace = ints

    def plan(self, queries, pages, indices, last, heads, kv_heads, dim, page, q_data_type, kv_data_type) -> None:
        assert (heads, kv_heads, dim, page) == (*HEADS, PAGE) and q_data_type == kv_data_type == torch.float32
        assert all(t.dtype == torch.int32 for t in (queries, pages, indices, last))
        given = {"qo_indptr_buf": queries, "paged_kv_indptr_buf": pages, "paged_kv_last_page_len_buf": last}
        given["paged_kv_indices_buf"] = indices
        self.plans, self.told = self.plans + 1, int(queries[-1])
        if not self.graph:
            self.buffers = {name: value.clone() for name, value in given.items()}
            return
        self.most = self.most or self.told
        assert self.told <= self.most, "more rows than at capture"
        assert len(last) == len(self.buffers["paged_kv_last_page_len_buf"]), "another number of groups"
        for name, value in given.items():
            self.buffers[name][: len(value)].copy_(value)

    def forward_return_lse(self, q: torch.Tensor, pool, causal: bool, sm_scale: float):
        assert not causal and (self.graph or len(q) == self.told)
        self.calls += 1
        out, lse = torch.full_like(q, NAN), torch.full(q.shape[:2], NAN)
        keys, values = (buffer.flatten(0, 1) for buffer in pool)
        queries, pages, indices, last = (
            self.buffers[name].tolist()
            for name in ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
        )
        for group, tokens in enumerate(last):
            read = indices[pages[group] : pages[group + 1]]
            slots = torch.tensor([page * PAGE + i for page in read for i in range(PAGE)], dtype=torch.int64)
            rows = slice(queries[group], queries[group + 1])
            if rows.start < rows.stop:
                slots = slots[: (len(read) - 1) * PAGE + tokens]
                out[rows], lse[rows] = attend_part(q[rows], keys[slots], values[slots], sm_scale)
        return out, lse


def test_a_plan() -> None:
    plan = Plan.of(grouping_of(TWO, 5), PAGE)
    assert [part.tolist() for part in (plan.queries, plan.pages, plan.indices, plan.last)] == [
        [0, 2, 4],
        [0, 1, 3],
        [7, 2, 3],
        [64, 64],
    ]


def test_a_plan_for_more_groups_than_there_are() -> None:
    plan = Plan.of(grouping_of(ONE, 5), PAGE, room=3)
    assert [part.tolist() for part in (plan.queries, plan.pages, plan.last)] == [[0, 3, 3, 3], [0, 3, 3, 3], [64, 0, 0]]


def test_more_groups_than_a_graph_has_room_for() -> None:
    with pytest.raises(RuntimeError, match="2 groups in a step of a CUDA graph that has room for 1"):
        Plan.of(grouping_of(TWO, 5), PAGE, room=1)


def test_room() -> None:
    """A batch has at most half as many groups as requests."""
    assert [room_for(batch) for batch in (2, 3, 8, 31, 33, 256)] == [1, 1, 4, 15, MOST_GROUPS, MOST_GROUPS]


def test_places_of_queries() -> None:
    assert rows_of(grouping_of(TWO, 5), 7).tolist() == [[0, 4, 1, 2, 0, 0, 0], [0, 2, 3, -1, 1, -1, -1]]
    assert rows_of(None, 2).tolist() == [[0, 0], [-1, -1]]


def on_a_cpu() -> Steps:
    return Steps(Wrapper, "cpu", torch.float32, 1e-5)


def test_steps_read_what_is_planned_before_them() -> None:
    in_turns(on_a_cpu())


def test_a_plan_is_made_when_groups_change_only() -> None:
    """Steps without groups make none, and leave the one that is there."""
    steps = on_a_cpu()
    steps.capture(6)
    wrapper, one = steps.together.graphs[6], grouping_of(ONE, 5)
    for grouping, plans in ((one, 2), (one, 2), (None, 2), (None, 2), (one, 2), (grouping_of(ONE, 5), 3)):
        steps.run(grouping, 5, 6, graph=True)
        assert wrapper.plans == plans


def test_steps_without_groups_cost_nothing() -> None:
    """No wrapper is asked, with a graph and without one, before there has been a group and after."""
    steps = on_a_cpu()
    steps.capture(6)
    wrapper = steps.together.graphs[6]
    steps.run(grouping_of(ONE, 5), 5, 6, graph=True)
    calls, order = wrapper.calls, steps.together.order.clone()
    for graph in (True, False):
        steps.run(None, 5, 6, graph=graph)
    assert wrapper.calls == calls and steps.together.eager is None
    assert torch.equal(steps.together.order, order), "nor is anything copied"


def test_two_graphs_of_a_size_have_the_buffers_of_one() -> None:
    steps = on_a_cpu()
    steps.capture(8, 6, 1)
    assert sorted(steps.graphs) == [(1, False), (6, False), (6, True), (8, False), (8, True)]
    assert sorted(steps.together.graphs) == [6, 8]


def test_graphs_share_a_workspace_and_are_planned_by_turns() -> None:
    """What one has planned is gone when another one has: both are planned anew although their groups are the same."""
    steps = on_a_cpu()
    steps.capture(8, 6)
    six, eight = steps.together.graphs[6], steps.together.graphs[8]
    assert six.workspace is eight.workspace
    one = grouping_of(ONE, 5)
    for padded in (6, 8, 6):
        steps.run(one, 5, padded, graph=True)
    assert (six.plans, eight.plans) == (3, 2)


def test_buffers_have_room_for_all_that_groups_can_read() -> None:
    steps = on_a_cpu()
    steps.capture(8)
    buffers = steps.together.graphs[8].buffers
    assert len(buffers["paged_kv_indices_buf"]) == 4 * POOL + PAST_THE_END
    assert len(steps.together.order) == len(steps.together.places) == 8


@pytest.mark.parametrize("batches", [(), (1,), (2,), (8, 6, 2, 1), (40, 33, 3)])
def test_the_memory_plan_counts_what_the_buffers_take(batches: tuple[int, ...]) -> None:
    """And what a wrapper of FlashInfer takes for itself: lengths in each, and its own workspace without a graph."""
    steps = on_a_cpu()
    assert steps.lsa.groups.planning_bytes == planning_bytes(5, (), POOL)
    if batches:
        steps.together.reserve(max(batches))
    for batch in batches:
        for steps.lsa.step in captured(batch, groups=True):
            steps.together.plan(batch, graph=True)
    together, wrappers = steps.together, steps.together.graphs.values()
    tensors = [together.order, together.places, *(part for each in wrappers for part in each.buffers.values())]
    tensors += [each.workspace for each in wrappers][:1]
    found = sum(part.numel() * part.element_size() for part in tensors)
    found += (len(wrappers) + 1) * KV_LENGTHS + INT_WORKSPACE
    assert found == planning_bytes(5, batches, POOL) == steps.lsa.groups.planning_bytes
