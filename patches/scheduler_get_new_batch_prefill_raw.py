"""Admission knows whether it may preempt, and a request that was preempted in vain goes back to the queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.resolved import resolved


@dataclass
class Pass:
    """One scheduling pass.

    Attributes:
        server_args: SGLang's, which its preemption wants; None where it may not preempt.
        adder: what put the batch together; None until a prompt was considered.
    """

    server_args: Any | None
    adder: Any | None = None


def get_new_batch_prefill(original, self, *args, **kwargs):
    arguments = resolved(self.server_args) if self.enable_priority_preemption else None
    current = self.tree_cache.scheduling_pass = Pass(arguments)
    batch, running_batch = original(self, *args, **kwargs)
    if batch is None and current.adder is not None:
        # SGLang preempts for a place, then looks for memory, and forgets whom it preempted if there is none.
        waiting = set(map(id, self.waiting_queue))  # 0.5.23 remembers them itself
        for req in current.adder.preempt_list:
            if id(req) not in waiting:
                self._add_request_to_queue(req)
    return batch, running_batch


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw",
    kind="around",
    function=get_new_batch_prefill,
    parameters=("self",),
    why="A prompt that waits for device pages never fills the batch, which is when SGLang preempts.",
    until="SGLang lets the tree cache ask for preemption.",
    test="tests/server/test_features.py::test_a_high_priority_does_not_wait_for_device_pages",
)
