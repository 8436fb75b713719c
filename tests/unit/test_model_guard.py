"""What SGLang loaded and built decides: real attention layers, and real pools."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.indexer.checkpoint import IndexerConfig, ModelShape
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.patches import base_kv_cache_method_process_weights_after_loading as missing_scales_hook
from sglang_lsa.patches import kv_cache_configurator_build_allocator as build_allocator_hook
from sglang_lsa.patches import model_runner_init_post_memory_pool_components as create_runtime_hook
from sglang_lsa.patches.compatibility import Unsupported
from sglang_lsa.patches.layouts import layout_of
from sglang_lsa.patches.model_guard import attention_layers, kv_scales, problems, softmax_scale
from sglang_lsa.radix_ext.allocator import VirtualPageAllocator

LAYERS, Q_HEADS, KV_HEADS, DIM = 5, 4, 2, 16


def attention(layer: int, **changed: Any) -> RadixAttention:
    heads = {"num_heads": Q_HEADS, "head_dim": DIM, "scaling": 0.25, "num_kv_heads": KV_HEADS}
    return RadixAttention(**{**heads, "layer_id": layer, **changed})


def model_of(*layers: RadixAttention) -> torch.nn.Module:
    """As SGLang builds them: attention somewhere inside a layer, beside what has none."""
    return torch.nn.ModuleList(
        torch.nn.ModuleDict({"attn": layer, "mlp": torch.nn.Linear(2, 2)})
        for layer in (layers or map(attention, range(LAYERS)))
    )


def pool_of(kind: type = MHATokenToKVPool, **changed: Any) -> Any:
    shape = {"head_num": KV_HEADS, "head_dim": DIM, "layer_num": LAYERS, "dtype": torch.float32}
    fixed = {"size": 4 * PAGE_SIZE, "page_size": PAGE_SIZE, "device": "cpu", "enable_memory_saver": False}
    return kind(**{**fixed, **shape, **changed})


def seen(model: torch.nn.Module, pool: Any, **changed: Any) -> list[str]:
    options = {"name": "m", "q_heads": Q_HEADS, "window": None, "model_dtype": torch.float32}
    return problems(model, pool, **{**options, **changed})


class OtherPool(MHATokenToKVPool):
    """What another builder of SGLang's would make."""


def test_a_dense_model_is_served() -> None:
    assert seen(model_of(), pool_of()) == []
    assert seen(model_of(), pool_of(dtype=torch.bfloat16)) == [], "on a CPU KV may have another type than queries"
    assert [layer.layer_id for layer in attention_layers(model_of())] == list(range(LAYERS))
    assert softmax_scale(model_of(*(attention(layer, scaling=0.015625) for layer in range(LAYERS)))) == 0.015625


def test_layers_that_are_kept_in_a_dictionary_are_seen() -> None:
    """SGLang's transformers backend does so."""
    model = torch.nn.Linear(2, 2)
    model.attention_instances = {layer: attention(layer) for layer in range(LAYERS)}
    assert seen(model, pool_of()) == []


DENSE = "not supported with LSA yet: use a dense model"
ONE_EACH = "not supported with LSA yet: use a model with one attention in each layer"
OTHER = "not supported with LSA yet: use another model"


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        (
            {layer: {"sliding_window_size": 127} for layer in (0, 1, 2, 4)},
            f"m sees a sliding window of tokens only in layers 0, 1, 2 and 1 more of 5: {DENSE}",
        ),
        ({3: {"use_irope": True}}, f"m attends within chunks of tokens in layer 3 of 5: {DENSE}"),
        ({3: {"is_cross_attention": True}}, f"m attends to what an encoder saw in layer 3 of 5: {DENSE}"),
        ({3: {"attn_type": AttentionType.ENCODER_ONLY}}, f"m looks at later tokens, too in layer 3 of 5: {DENSE}"),
        ({3: None}, f"m has no attention in layer 3 of 5: {ONE_EACH}"),
        (
            {2: {"layer_id": 1}},
            f"m has no attention in layer 2 of 5: {ONE_EACH}\nm attends more than once with the KV "
            f"of layer 1: {ONE_EACH}",
        ),
        ({5: {}}, f"m has attention in layer 5, its KV pool has 5 layers: {ONE_EACH}"),
        ({3: {"scaling": 0.5}}, f"m scales attention differently in its layers (0.25, 0.5): {OTHER}"),
        ({3: {"v_head_dim": 8}}, f"m has keys of 16 numbers and values of 8: {OTHER}"),
        (
            {3: {"num_kv_heads": 1}},
            f"m has layers of 4 query heads, 1 KV heads, 16 numbers each, others of 4 query heads, 2 KV heads, "
            f"16 numbers each: {OTHER}",
        ),
        ({3: {"logit_cap": 30.0}}, "m caps its attention at 30: not recorded yet: leave out --lsa-record"),
    ],
    ids=["window", "chunks", "cross", "encoder", "none", "repeated", "beyond", "scale", "v_head_dim", "heads", "cap"],
)
def test_layers_that_cannot_work(layers: dict[int, dict[str, Any] | None], problem: str) -> None:
    wanted = {layer: {} for layer in range(LAYERS)} | layers
    made = [
        attention(layer, **changed) if "layer_id" not in changed else attention(**{"layer": 0, **changed})
        for layer, changed in wanted.items()
        if changed is not None
    ]
    assert seen(model_of(*made), pool_of(), record=True) == problem.split("\n")


def test_a_cap_is_only_in_the_way_of_recordings() -> None:
    assert seen(model_of(*(attention(layer, logit_cap=30.0) for layer in range(LAYERS))), pool_of()) == []


def test_a_window_that_only_the_backend_has() -> None:
    """SGLang takes a configuration's chunks for one (text-only Llama 4)."""
    assert seen(model_of(), pool_of(), window=8192) == [f"m is served with a sliding window of 8192 tokens: {DENSE}"]


def test_the_type_of_kv_that_a_checkpoint_asks_for() -> None:
    words = "KV is kept in int8, as --kv-cache-dtype or the checkpoint asks for: not supported with LSA yet: "
    assert seen(model_of(), pool_of(dtype=torch.int8)) == [words + "use --kv-cache-dtype bfloat16"]


# --- FP8 -------------------------------------------------------------------------------------------------------------


class Checkpoint(QuantizationConfig):
    """What a quantized checkpoint makes SGLang load, as far as KV goes."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> BaseKVCacheMethod:
        return BaseKVCacheMethod(self)


Checkpoint.__abstractmethods__ = frozenset()


def scaled(*scales: tuple[float, float] | None) -> torch.nn.Module:
    """A model that was loaded from a checkpoint with these scales of keys and values, None for a layer without."""
    made = [attention(layer, quant_config=Checkpoint()) for layer in range(LAYERS)]
    for layer, found in zip(made, scales, strict=True):
        if found is not None:
            layer.k_scale.data.fill_(found[0])
            layer.v_scale.data.fill_(found[1])
        missing_scales_hook.note_missing_scales(layer.quant_method, layer)
        layer.quant_method.process_weights_after_loading(layer)
    return model_of(*made)


SCALES = tuple((0.25 * (layer + 1), 0.5) for layer in range(LAYERS))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_served(dtype: torch.dtype) -> None:
    for model in (scaled(*SCALES), scaled((1.0, 1.0), *SCALES[1:])):
        assert seen(model, pool_of(dtype=dtype), kv_dtype_asked="auto") == []
    assert seen(model_of(), pool_of(dtype=dtype), kv_dtype_asked="fp8_e4m3") == []


def test_a_checkpoint_that_lacks_scales(caplog: pytest.LogCaptureFixture) -> None:
    """One that asks for FP8 KV: SGLang would take 1 without a word."""
    pool = pool_of(dtype=torch.float8_e4m3fn)
    fix = "use --kv-cache-dtype bfloat16, or --kv-cache-dtype fp8_e4m3 to serve it with scales of 1"
    some = scaled(None, SCALES[1], SCALES[2], None, SCALES[4])
    assert seen(some, pool) == [f"m asks for FP8 KV and has no scales for layers 0, 3 of 5: {fix}"]
    assert seen(model_of(), pool) == [f"m asks for FP8 KV and has no scales for layers 0, 1, 2 and 2 more of 5: {fix}"]
    assert seen(some, pool_of()) == []
    with caplog.at_level("WARNING", logger="sglang_lsa"):
        assert seen(some, pool, kv_dtype_asked="fp8_e4m3") == []
    assert "m has no scales of FP8 KV for layers 0, 3 of 5: as SGLang does, 1 is taken" in caplog.text


def test_scales_beside_kv_that_was_not_divided_by_them() -> None:
    """FlashInfer of SGLang multiplies all the same; FlashAttention-3 and ``torch_native`` do not."""
    pool = pool_of(dtype=torch.bfloat16)
    (problem,) = seen(scaled(*SCALES), pool, attention=("fa3", "flashinfer"))
    assert problem.startswith("m has scales of FP8 KV for layers 0, 1, 2 and 2 more of 5, and KV is kept in bfloat16,")
    assert problem.endswith("use --kv-cache-dtype fp8_e4m3, or --attention-backend fa3 on Hopper")
    assert seen(scaled(*SCALES), pool, attention=("fa3", "fa3")) == []
    assert seen(scaled(*SCALES), pool, attention=("torch_native", "torch_native")) == []
    assert seen(scaled(*[(1.0, 1.0)] * LAYERS), pool, attention=("flashinfer",)) == []
    assert seen(model_of(), pool, attention=("flashinfer",)) == []
    assert seen(scaled(*SCALES), pool_of(dtype=torch.float8_e4m3fn), attention=("flashinfer",)) == []


def test_scales_are_those_of_the_layers_as_they_are_now() -> None:
    """An update of the weights changes them; ``torch_native`` on a CPU knows none."""
    model = scaled(*SCALES)
    scales = kv_scales(model, "cuda")
    assert [scales(layer) for layer in range(LAYERS)] == list(SCALES)
    attention_layers(model)[2].v_scale_float = 2.0
    assert scales(2) == (0.75, 2.0)
    assert kv_scales(model, "cpu")(2) == kv_scales(model_of(), "cuda")(2) == (1.0, 1.0)


def test_the_layout_of_an_fp8_pool() -> None:
    pool = pool_of(dtype=torch.float8_e4m3fn)
    pool.k_buffer[1][PAGE_SIZE : 2 * PAGE_SIZE] = (
        torch.full((PAGE_SIZE, KV_HEADS, DIM), 1.5).to(pool.dtype).view(torch.uint8)
    )
    layout = layout_of(pool, PAGE_SIZE, torch.bfloat16, kv_scales(scaled(*SCALES), "cuda"))
    shown = layout.keys(1, torch.tensor([1]))
    assert torch.equal(shown, torch.full((1, PAGE_SIZE, KV_HEADS, DIM), 0.75, dtype=torch.bfloat16))
    assert 4 * layout.page_bytes == layout_of(pool_of(), PAGE_SIZE, torch.float32, lambda layer: (1.0, 1.0)).page_bytes


def test_pools_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "m: SGLang keeps its KV in a OtherPool: not supported with LSA yet: serve it without --lsa flags"
    assert seen(model_of(), pool_of(OtherPool)) == [words]
    assert seen(model_of(), SimpleNamespace(), window=3)[0].startswith("m: SGLang keeps its KV in a SimpleNamespace")
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    words = "the KV pool has the layout hnd, LSA reads nhd: not supported with LSA yet: unset SGLANG_USE_HND_KVCACHE"
    (problem,) = seen(model_of(), pool_of())
    assert problem.startswith(words)


# --- the hooks -------------------------------------------------------------------------------------------------------


def configurator(model: torch.nn.Module) -> Any:
    """What the hook reads of SGLang's KVCacheConfigurator."""
    return SimpleNamespace(
        model=model,
        model_config=SimpleNamespace(model_path="m", num_attention_heads=Q_HEADS),
        ps=SimpleNamespace(tp_size=1),
        sliding_window_size=None,
        model_dtype=torch.float32,
        kv_cache_dtype=torch.float32,
        device="cpu",
        server_args=SimpleNamespace(
            lsa_config=LSAConfig(),
            kv_cache_dtype="auto",
            tp_size=1,
            attention_backend="torch_native",
            prefill_attention_backend=None,
            decode_attention_backend=None,
            get_attention_backends=lambda: ("torch_native",) * 2,
        ),
    )


def build(model: torch.nn.Module) -> VirtualPageAllocator:
    sizes = SimpleNamespace(max_total_num_tokens=16 * PAGE_SIZE)
    return build_allocator_hook.build_allocator(None, configurator(model), sizes=sizes, token_to_kv_pool=pool_of())


def test_all_problems_end_the_process_with_the_words_of_a_refusal_at_start() -> None:
    bad = model_of(*(attention(layer, sliding_window_size=9, scaling=1 / (layer + 1)) for layer in range(LAYERS - 1)))
    with pytest.raises(SystemExit) as ended:
        build(bad)
    found = seen(bad, pool_of())
    assert len(found) == 3
    assert ended.value.code == f"sglang-lsa: {Unsupported(found)}"


def runner_of(model: torch.nn.Module, lsa_config: LSAConfig, **text: int) -> Any:
    """What SGLang's runner has of ``model`` when the pools are there.

    Args:
        text: of its Hugging Face configuration, where it is not what ``model`` is.
    """
    args = SimpleNamespace(
        lsa_config=lsa_config,
        chunked_prefill_size=512,
        enable_metrics=False,
        device="cpu",
        tp_size=1,
    )
    sizes = {"hidden_size": Q_HEADS * DIM, "num_hidden_layers": LAYERS, "num_attention_heads": Q_HEADS}
    config = SimpleNamespace(num_attention_heads=Q_HEADS, head_dim=DIM, vocab_size=9, hidden_size=Q_HEADS * DIM)
    config.hf_text_config = SimpleNamespace(**sizes | {"num_key_value_heads": KV_HEADS} | text)
    return SimpleNamespace(
        model=model,
        model_config=config,
        server_args=args,
        ps=SimpleNamespace(tp_size=1),
        token_to_kv_pool_allocator=build(model),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros((3, 4 * PAGE_SIZE), dtype=torch.int32)),
    )


@pytest.mark.parametrize("scale", [0.25, 0.015625])
def test_scores_and_recordings_use_the_scale_of_the_layers(scale: float, tmp_path: pathlib.Path) -> None:
    """Granite multiplies by its attention_multiplier instead of 1/sqrt(head_dim)."""
    model = model_of(*(attention(layer, scaling=scale) for layer in range(LAYERS)))
    runner = runner_of(model, LSAConfig(record=str(tmp_path)))
    create_runtime_hook.create_runtime(None, runner)
    assert runner.lsa.lookahead.scorer.policies["quest"].scale == scale
    assert runner.lsa.recorder is not None
    assert runner.lsa.recorder.scale == scale


SMOLLM2 = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}


@pytest.mark.parametrize(
    ("policy", "text", "named"),
    [("quest", SMOLLM2, True), ("quest", {}, False), ("recency", SMOLLM2, False)],
    ids=["fits", "another model", "not Quest"],
)
def test_quest_says_which_indexer_would_fit(
    policy: str, text: dict[str, int], named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="sglang_lsa"):
        create_runtime_hook.create_runtime(None, runner_of(model_of(), LSAConfig(policy=policy), **text))
    assert f"LSA: policy {policy}, budget 0.135, for contexts from 4096 tokens on" in caplog.text
    assert ("where it is named: --lsa-indexer smollm2-135m-instruct" in caplog.text) == named


@pytest.mark.parametrize("trained", [True, False])
def test_heads_found_at_start_say_which_indexer_would_fit(
    trained: bool, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are what a GPU serves with unless told otherwise, and may keep fewer answers than one that was trained."""
    shape = ModelShape(Q_HEADS * DIM, LAYERS, Q_HEADS, KV_HEADS, DIM)
    MemoryIndexer(IndexerConfig(shape, heads=((0, 0),), key_dim=DIM, trained=trained)).save(tmp_path)
    config = LSAConfig(policy="indexer", indexer=str(tmp_path))
    with caplog.at_level("INFO", logger="sglang_lsa"):
        create_runtime_hook.create_runtime(None, runner_of(model_of(), config, **SMOLLM2))
    assert ("heads found at start choose pages; an indexer trained for a model of this shape" in caplog.text) != trained
