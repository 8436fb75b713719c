"""Around loading a model: ranks that were told different things are found out before it; calibration comes after it,
where it is wanted."""

from __future__ import annotations

from sglang_lsa.patches.architectures import is_deepseek_v4
from sglang_lsa.patches.arguments import tp_size_of
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.ranks import ranks
from sglang_lsa.patches.resolved import remember


def load_model(original, self, *args, **kwargs):
    compare_options(self)
    loaded = original(self, *args, **kwargs)
    calibrate(self)
    return loaded


def compare_options(self):
    if tp_size_of(self) > 1:
        require_equal_options(ranks(tp_size_of(self)), self.server_args.lsa_config)


def require_equal_options(joined, config):
    """
    Raises:
        ValueError: another rank has other options; all of them raise it.
    """
    seen = joined.every(repr(config), "compare options")
    for rank, told in enumerate(seen):
        if told != seen[0]:
            raise ValueError(
                f"LSA: ranks have different options: rank 0 has {seen[0]}, rank {rank} has {told}: start all of them "
                "with the same flags"
            )


def calibrate(self):
    from sglang_lsa.patches.calibration import calibrated

    config = self.server_args.lsa_config
    if config.calibrates and not self.is_draft_worker and not is_deepseek_v4(self.model_config):
        remember(self.server_args, "lsa_config", calibrated(config, self))


HOOK = Hook(
    target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
    kind="around",
    function=load_model,
    parameters=("self",),
    why="Ranks that prune differently wait for each other's collectives for ever; weights take minutes to load first. "
    "Which heads look at evidence decides what is observed and what pages cost beside KV: it is needed before pools.",
    until="SGLang compares what its ranks were told, and calls plugins when its model is loaded.",
    test="tests/unit/test_ranks.py::test_ranks_with_different_options_are_refused_before_weights_are_loaded",
    relies_on=(
        "sglang.srt.distributed.parallel_state.get_tp_group",
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
