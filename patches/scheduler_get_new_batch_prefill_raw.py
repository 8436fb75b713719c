"""Prompts wait for the decode steps that are due; admission knows whether it may preempt, and a request that was
preempted in vain goes back to the queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.requests import leaves_room
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


def get_new_batch_prefill(original, self, prefill_delayer_single_pass, running_batch, *args, **kwargs):
    pace, running = self.tree_cache.lsa.pace, running_batch
    decoding = [] if running.is_prefill_only else [req for req in running.reqs if not req.finished()]
    prompts = bool(self.waiting_queue or self.chunked_req or self.grammar_manager.has_waiting_grammars())
    chunked = self.chunked_req is not None
    if pace.prompts_wait(len(decoding), prompts, lambda: step_fits(self, decoding), chunked):
        return None, running  # SGLang finds a prompt's next chunk where it left it
    arguments = resolved(self.server_args) if self.enable_priority_preemption else None
    current = self.tree_cache.scheduling_pass = Pass(arguments)
    batch, running_batch = original(self, prefill_delayer_single_pass, running, *args, **kwargs)
    if batch is None and current.adder is not None:
        # SGLang preempts for a place, then looks for memory, and forgets whom it preempted if there is none.
        waiting = set(map(id, self.waiting_queue))  # 0.5.23 remembers them itself
        for req in current.adder.preempt_list:
            if id(req) not in waiting:
                self._add_request_to_queue(req)
    if batch is not None:
        pace.computed(batch.extend_num_tokens, part=all(req is self.chunked_req for req in batch.reqs))
    return batch, running_batch


def step_fits(scheduler, decoding):
    """Whether these may decode before the next chunk of the prompt that is computed in chunks, if there is one."""
    if scheduler.chunked_req is None:
        return True
    allocator, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    if scheduler.is_hybrid_swa:
        free = allocator.full_available_size() + tree.full_evictable_size()
    else:
        free = allocator.available_size() + tree.evictable_size()
    return leaves_room(tree.lsa, decoding, scheduler.chunked_req, free)


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw",
    kind="around",
    function=get_new_batch_prefill,
    parameters=("self", "prefill_delayer_single_pass", "running_batch"),
    why="SGLang computes all prompts before it decodes again, and they are many where the device pool takes many "
    "contexts. And a prompt that waits for device pages never fills the batch, which is when SGLang preempts.",
    until="SGLang bounds prompts beside decode steps, and lets the tree cache ask for preemption.",
    test="tests/server/test_features.py::test_a_high_priority_does_not_wait_for_device_pages",
    relies_on=(
        "sglang.srt.constrained.grammar_manager.GrammarManager.has_waiting_grammars",
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
        "sglang.srt.managers.schedule_policy.PrefillAdder.rem_total_tokens",
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run",
    ),
)
