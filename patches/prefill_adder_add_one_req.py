"""A prompt is admitted when the device pool can take it, too: whole, chunk by chunk, or over a resident prefix."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def add_one_req(original, self, req, *args, **kwargs):
    from sglang.srt.managers.schedule_policy import AddReqResult

    admission = self.tree_cache.lsa.admission
    batch = prefills_of(self)
    running = len(self.running_batch.reqs) if self.running_batch is not None else 0
    how = admission.choose(req, running + len(self.can_run_list), batch, self.rem_chunk_tokens)
    if how is None:
        # Not NO_TOKEN: that would close admission until a running request ends, but device pages come back as soon
        # as a prompt is prefilled.
        return AddReqResult.OTHER
    limit_chunk(self, how)
    admitted = len(self.can_run_list)
    result = original(self, req, *args, **kwargs)
    if len(self.can_run_list) > admitted:
        admission.promise(req, how)
        batch.append(how.how)
    return result


def prefills_of(adder) -> list[str]:
    """How the prompts of the pass that ``adder`` puts together are prefilled."""
    return adder.__dict__.setdefault("lsa_prefills", [])


def limit_chunk(adder, how) -> None:
    """No more of this prompt at once than device pages were promised for."""
    if adder.rem_chunk_tokens is not None and how.chunk_tokens is not None:
        adder.rem_chunk_tokens = min(adder.rem_chunk_tokens, how.chunk_tokens)


HOOK = Hook(
    target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
    kind="around",
    function=add_one_req,
    parameters=("self", "req"),
    why="SGLang admits by virtual tokens, of which there are more than the device pool holds.",
    until="SGLang lets the tree cache veto admission.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
)
