"""Where groups are formed, two CUDA graphs of a size are captured: one that reads in groups, then one that does not."""

from __future__ import annotations

from sglang_lsa.engine.step import IDLE, captured
from sglang_lsa.patches.graph_variants import label
from sglang_lsa.patches.hook import Hook


def capture_one_shape(original, self, size, forward, stream_idx=None, variant_label=None, *others):
    lsa = self.model_runner.lsa
    try:
        for step in captured(size, lsa.groups is not None):
            lsa.step = step
            original(self, size, forward, stream_idx, label(variant_label, step.reads_together), *others)
    finally:
        lsa.step = IDLE


HOOK = Hook(
    target="sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture_one_shape",
    kind="around",
    function=capture_one_shape,
    parameters=("self", "size", "forward", "stream_idx", "variant_label"),
    why="With one graph of each size, steps in which nothing is read together would pay for calls that read nothing.",
    until="SGLang lets the attention backend name variants of a graph.",
    test="tests/unit/test_graph_variants.py::test_capture_order",
    relies_on=(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._capture_one_stream",
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._make_graph_key",
        "sglang.srt.model_executor.runner.shape_key.ShapeKey",
        "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend.FullCudaGraphBackend.capture_one",
    ),
)
