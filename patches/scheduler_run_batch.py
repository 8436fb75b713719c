"""Pages are made resident before a forward pass; mirror and resident sets are brought up to date after it."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def run_batch(original, self, batch, *args, **kwargs):
    lsa = self.tp_worker.model_runner.lsa
    number = lsa.before_forward(batch)
    result = original(self, batch, *args, **kwargs)
    lsa.after_forward(batch, number)
    return result


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.run_batch",
    kind="around",
    function=run_batch,
    parameters=("self", "batch"),
    why="The one place that sees every forward pass together with its requests.",
    until="SGLang calls plugins around a forward pass.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
)
