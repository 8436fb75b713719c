"""Of the two CUDA graphs of a size, a step replays the one that reads in groups if some of its requests do."""

from __future__ import annotations

from sglang_lsa.patches.graph_variants import label
from sglang_lsa.patches.hook import Hook


def resolve_lora_variant(result, self, forward_batch):
    return label(result, self.model_runner.lsa.step.reads_together)


HOOK = Hook(
    target="sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._resolve_lora_variant",
    kind="after",
    function=resolve_lora_variant,
    parameters=("self", "forward_batch"),
    why="The method says which variant of a graph is replayed; LoRA is the only reason for one that SGLang knows.",
    until="SGLang lets the attention backend choose the variant.",
    test="tests/unit/test_graph_variants.py::test_which_graph_is_replayed",
    relies_on=("sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.load_batch",),
)
