"""Pages are made resident before a forward pass; mirror and resident sets are brought up to date after it."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def run_batch(original, self, batch, *args, **kwargs):
    lsa = self.tp_worker.model_runner.lsa
    if self.enable_overlap and self.device == "cuda":
        lsa.run_on(self.forward_stream)
    number = lsa.before_forward(batch, self.token_to_kv_pool_allocator.take_new_pages())
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
