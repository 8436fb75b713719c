"""A prompt is admitted when the device pool can take it, too: whole, chunk by chunk, or over a resident prefix."""

from __future__ import annotations

from sglang_lsa.engine.preemption import pages_let_go
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.releases import installed
from sglang_lsa.patches.requests import choose, key_of, promise, prompt_of


def add_one_req(original, self, req, *args, **kwargs):
    from sglang.srt.managers.schedule_policy import AddReqResult

    admission = self.tree_cache.lsa.admission
    self.tree_cache.scheduling_pass.adder = self
    batch = prefills_of(self)
    how = choose(admission, req, running(self), batch, self.rem_chunk_tokens)
    if how is None and not batch:
        how = choose_after_preemption(self, req)
    if how is None:
        # Not NO_TOKEN: that would close admission until a running request ends, but device pages come back as soon
        # as a prompt is prefilled.
        return AddReqResult.OTHER
    limit_chunk(self, how)
    admitted = len(self.can_run_list)
    result = original(self, req, *args, **kwargs)
    if len(self.can_run_list) > admitted:
        promise(admission, req, how)
        batch.append(how.how)
    return result


def running(adder) -> int:
    """Requests that decode, or were admitted in this pass."""
    decoding = len(adder.running_batch.reqs) if adder.running_batch is not None else 0
    return decoding + len(adder.can_run_list)


def prefills_of(adder) -> list[str]:
    """How the prompts of the pass that ``adder`` puts together are prefilled."""
    return adder.__dict__.setdefault("lsa_prefills", [])


def limit_chunk(adder, how) -> None:
    """No more of this prompt at once than device pages were promised for."""
    if adder.rem_chunk_tokens is not None and how.chunk_tokens is not None:
        adder.rem_chunk_tokens = min(adder.rem_chunk_tokens, how.chunk_tokens)


# -- preemption (--enable-priority-scheduling) -------------------------------------------------------------------------


def choose_after_preemption(adder, req):
    """How ``req`` can be prefilled once requests of lower priority are preempted; as few of them as will do.

    None is preempted unless that lets it in. SGLang decides who comes first, and puts them back into its queue.
    """
    lsa, server_args = adder.tree_cache.lsa, adder.tree_cache.scheduling_pass.server_args
    if server_args is None or not (below := preemptible(adder, req, server_args)):
        return None
    prompt = prompt_of(lsa.admission, req)
    gains = pages_let_go(lsa.pager, [key_of(other) for other in below], prompt.prefix)
    # Pages that are let go count like pages that running requests need not be left.
    tried = (lsa.admission.possible(prompt, running(adder) - gain, [], adder.rem_chunk_tokens) for gain in gains)
    count = next((count for count, found in enumerate(tried, start=1) if found is not None), None)
    if count is None:
        return None
    enough = len(adder.preempt_list) + count
    preempt = [req] if installed().resolves_late else [req, server_args]
    while len(adder.preempt_list) < enough and adder.preempt_to_schedule(*preempt):
        pass
    # Preempting may have taken from the radix tree what this prompt had found there.
    req.init_next_round_input(adder.tree_cache)
    return choose(lsa.admission, req, running(adder), [], adder.rem_chunk_tokens)


def preemptible(adder, req, server_args) -> list:
    """Running requests that ``req`` may preempt, in the order of SGLang's ``preempt_to_schedule``."""
    sign = 1 if server_args.schedule_low_priority_values_first else -1
    found = [
        other
        for other in adder.running_batch.reqs
        if other not in adder.preempt_list
        and not other.finished()
        and (other.priority - req.priority) * sign > adder.priority_scheduling_preemption_threshold
    ]
    return sorted(found, key=lambda other: (-sign * other.priority, -other.time_stats.wait_queue_entry_time))


HOOK = Hook(
    target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
    kind="around",
    function=add_one_req,
    parameters=("self", "req"),
    why="SGLang admits by virtual tokens, of which there are more than the device pool holds.",
    until="SGLang lets the tree cache veto admission.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
    relies_on=(
        "sglang.srt.managers.schedule_policy.AddReqResult",
        "sglang.srt.managers.schedule_policy.PrefillAdder.__init__",
        "sglang.srt.managers.schedule_policy.PrefillAdder.budget_state",
        "sglang.srt.managers.schedule_policy.PrefillAdder.preempt_to_schedule",
        "sglang.srt.managers.schedule_batch.Req.finished",
        "sglang.srt.managers.schedule_batch.Req.init_next_round_input",
    ),
)
