"""The logprobs of a prompt are its own, also where a request before it in the batch lost its place meanwhile."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.releases import installed


def keep_logprobs_in_step(self, batch, result, *args, **kwargs):
    """Take the rows of prompts that SGLang is going to skip out of the batch's input logprobs.

    SGLang reads those rows one prompt after the other, and does not step over the ones of a prompt that it skips.
    """
    if not batch.return_logprob or not any(skipped(req) for req in batch.reqs):
        return
    output = result.logits_output
    if output.input_token_logprobs is None:
        return
    count = self.logprob_result_processor.calculate_num_input_logprobs
    lengths, starts = result.extend_input_len_per_req, result.extend_logprob_start_len_per_req
    kept: list[int] = []
    end = 0
    for req, length, start in zip(batch.reqs, lengths, starts, strict=True):
        begin, end = end, end + count(req, length, start)
        if not skipped(req):
            kept += range(begin, end)
    if result.copy_done is not None:
        result.copy_done.synchronize()  # or the rows are still on their way from the device
    if installed().checkpoints:
        output.finalize_input_logprobs()  # which have an event of their own there
    output.input_token_logprobs = output.input_token_logprobs[kept]


def skipped(req):
    return req.is_retracted or (req.finished() and req.inflight_middle_chunks <= 0)


HOOK = Hook(
    target="sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    ".process_batch_result_prefill",
    kind="before",
    function=keep_logprobs_in_step,
    parameters=("self", "batch", "result"),
    why="A prompt behind one that was preempted or retracted in its first pass is told the other's input logprobs.",
    until="SGLang counts the rows of every prompt.",
    test="tests/unit/test_retraction.py::test_prompt_logprobs_are_of_this_prompt",
    relies_on=(
        "sglang.srt.managers.scheduler_components.logprob_result_processor.SchedulerLogprobResultProcessor.calculate_num_input_logprobs",
        "sglang.srt.layers.logits_processor.LogitsProcessorOutput.finalize_input_logprobs",
        "sglang.srt.managers.utils.GenerationBatchResult",
        "sglang.srt.managers.schedule_batch.Req.finished",
    ),
)
