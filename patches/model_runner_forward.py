"""Prompts over a resident prefix are run twice: a first look says which pages of the prefix the second run reads."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def forward(original, self, forward_batch, *args, **kwargs):
    lsa = getattr(self, "lsa", None)  # absent while kernels are warmed up
    if lsa is not None and lsa.step.looks and forward_batch.forward_mode.is_extend():
        original(self, forward_batch, *args, **kwargs)
        lsa.choose_resident()
    return original(self, forward_batch, *args, **kwargs)


HOOK = Hook(
    target="sglang.srt.model_executor.model_runner.ModelRunner.forward",
    kind="around",
    function=forward,
    parameters=("self", "forward_batch"),
    why="What a prompt asks of its cached prefix is not known before its queries are.",
    until="The prompt's queries can be predicted without the model.",
    test="tests/server/test_resident_prefill.py::test_a_question_about_a_long_memory",
    relies_on=("sglang.srt.model_executor.forward_batch_info.ForwardMode.is_extend",),
)
