"""Logprobs of given tokens, in a batch where others ask for none."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def empty_rows(
    result, logprobs, token_ids_logprobs_list, stage, extend_logprob_pruned_lens_cpu=None, no_copy_to_cpu=False
):
    if not no_copy_to_cpu:
        return result
    values, indices = result
    return [logprobs.new_empty(0) if isinstance(row, list) else row for row in values], indices


HOOK = Hook(
    target="sglang.srt.layers.logprob_processor.get_token_ids_logprobs_raw",
    kind="after",
    function=empty_rows,
    parameters=("logprobs", "token_ids_logprobs_list", "stage", "no_copy_to_cpu"),
    why="Rows of those who ask for none are lists where tensors are expected: the scheduler ends with the batch.",
    until="SGLang makes them tensors.",
    test="tests/server/test_screen.py::test_token_ids_logprob_in_company",
)
