"""A prompt is admitted when the device pool can take it, too."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def add_one_req(original, self, req, *args, **kwargs):
    from sglang.srt.managers.schedule_policy import AddReqResult

    lsa = self.tree_cache.lsa
    running = len(self.running_batch.reqs) if self.running_batch is not None else 0
    if not lsa.can_prefill(req, running + len(self.can_run_list)):
        # Not NO_TOKEN: that would close admission until a running request ends, but device pages come back as soon
        # as a prompt is prefilled.
        return AddReqResult.OTHER
    admitted = len(self.can_run_list)
    result = original(self, req, *args, **kwargs)
    if len(self.can_run_list) > admitted:
        lsa.promise(req)
    return result


HOOK = Hook(
    target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
    kind="around",
    function=add_one_req,
    parameters=("self", "req"),
    why="SGLang admits by virtual tokens, of which there are more than the device pool holds.",
    until="SGLang lets the tree cache veto admission.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
)
