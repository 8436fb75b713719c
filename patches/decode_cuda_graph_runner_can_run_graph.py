"""A decode step that reads more than the CUDA graphs' buffers hold runs without a graph."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def can_run_graph(result, self, forward_batch):
    return result and self.model_runner.lsa.step.fits_graph


HOOK = Hook(
    target="sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph",
    kind="after",
    function=can_run_graph,
    parameters=("self", "forward_batch"),
    why="The buffers are sized by resident sets, not by whole contexts; many dense requests can exceed them.",
    until="SGLang lets the attention backend refuse a graph.",
    test="tests/gpu/test_gpu_server.py::test_dense_batches_beyond_the_graph_buffers",
)
