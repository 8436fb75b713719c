"""Layers whose scales of FP8 KV a checkpoint lacks are remembered: SGLang goes on with 1 and keeps no trace of it."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def note_missing_scales(self, layer):
    layer.lsa_lacks_scales = bool(layer.k_scale < 0.0 and layer.v_scale < 0.0)  # as they are made, before loading


HOOK = Hook(
    target="sglang.srt.layers.quantization.kv_cache.BaseKVCacheMethod.process_weights_after_loading",
    kind="before",
    function=note_missing_scales,
    parameters=("self", "layer"),
    why="A checkpoint that asks for FP8 KV and has no scales would be served wrongly instead of refused.",
    until="SGLang refuses such checkpoints, or tells which layers lack scales.",
    test="tests/unit/test_model_guard.py::test_a_checkpoint_that_lacks_scales",
    relies_on=("sglang.srt.layers.quantization.kv_cache.BaseKVCacheMethod.create_weights",),
)
