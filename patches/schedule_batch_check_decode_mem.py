"""Requests are retracted when the device pool has no page for them to grow into, too."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.requests import can_decode


def check_decode_mem(original, self, selected_indices=None):
    reqs = self.reqs if selected_indices is None else [self.reqs[i] for i in selected_indices]
    return original(self, selected_indices) and can_decode(self.tree_cache.lsa, reqs)


HOOK = Hook(
    target="sglang.srt.managers.schedule_batch.ScheduleBatch.check_decode_mem",
    kind="around",
    function=check_decode_mem,
    parameters=("self", "selected_indices"),
    why="SGLang retracts by virtual tokens, of which there are more than the device pool holds.",
    until="SGLang lets the allocator veto a decode step.",
    test="tests/server/test_pressure.py::test_dense_requests_are_retracted_and_finish",
    relies_on=(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
        "sglang.srt.managers.scheduler.Scheduler.update_running_batch",
    ),
)
