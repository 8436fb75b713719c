"""Between loading a model and sizing its pools: calibration, where nobody said how pages are chosen."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def calibrate_loaded(result, self):
    from sglang_lsa.patches.calibration import calibrated

    config = self.server_args.lsa_config
    if config.calibrates and not self.is_draft_worker:
        object.__setattr__(self.server_args, "lsa_config", calibrated(config, self))  # resolved arguments are read-only


HOOK = Hook(
    target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
    kind="after",
    function=calibrate_loaded,
    parameters=("self",),
    why="Which heads look at evidence decides what is observed and what pages cost beside KV: it is needed first.",
    until="SGLang calls plugins when its model is loaded.",
    test="tests/server/test_calibration.py::test_first_start_calibrates_and_the_second_remembers",
    relies_on=(
        "sglang.srt.model_executor.model_runner.ModelRunner.initialize",
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
        "sglang.srt.model_executor.forward_batch_info.ForwardMode",
        "sglang.srt.model_executor.forward_context.ForwardContext",
        "sglang.srt.model_executor.forward_context.forward_context",
        "sglang.srt.model_executor.forward_context.get_attn_backend",
        "sglang.srt.layers.radix_attention.RadixAttention.forward",
        "sglang.srt.utils.hf_transformers.tokenizer.get_tokenizer",
    ),
)
