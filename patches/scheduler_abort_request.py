"""Aborting one request ends that one, not every one whose name begins alike."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.screen.rids import only


def abort_exactly(original, self, recv_req):
    if recv_req.abort_all:
        return original(self, recv_req)
    if not recv_req.rid:
        return None  # begins every name
    with only(recv_req.rid, alive(self)):
        return original(self, recv_req)


def alive(scheduler):
    """Every request that the scheduler's abort looks at; servers that have more queues are refused at start."""
    batches = (scheduler.running_batch, scheduler.last_batch)
    chunked = [scheduler.chunked_req] if scheduler.chunked_req is not None else []
    running = [request for batch in batches if batch is not None for request in batch.reqs]
    return [*chunked, *scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue, *running]


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.abort_request",
    kind="around",
    function=abort_exactly,
    parameters=("self", "recv_req"),
    why="SGLang compares with str.startswith: a hang-up of job-1 ends job-10 and job-11.",
    until="SGLang compares whole names.",
    test="tests/server/test_screen.py::test_an_abort_ends_one_request",
)
