"""One look at the model as SGLang loaded it and at the KV pool as it was built, before anything is served.

What a configuration names is not what SGLang runs: Mistral-7B-v0.1 names a sliding window that no layer of SGLang's
model has, and a checkpoint may ask for FP8 KV that no flag mentions. Here the layers and the pool speak for
themselves. Refused before anything is loaded is only what is sure then; see :mod:`sglang_lsa.patches.models`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import ModelConfig, is_minimax_sparse
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4SingleKVPool, DeepSeekV4TokenToKVPool
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_lsa.memory.layout.dsv4 import INDEX_ROW, KV_ROW
from sglang_lsa.memory.layout.mha_fp8 import Scales
from sglang_lsa.patches.layouts import FP8_DTYPES, LAYOUTS

logger = logging.getLogger(__name__)

KV_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BFLOAT16 = "use --kv-cache-dtype bfloat16"
NOT_YET = "not supported with LSA yet"


def other_cache(model: ModelConfig) -> str | None:
    """What some layers have that keep something else than KV, or not all of it, by SGLang's own word; else None."""
    if mambaish_config(model) is not None:
        return "state-space or linear-attention"
    return "sparse-attention" if is_minimax_sparse(model.hf_config) else None


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """All attention layers of a model that keep KV, by the number of their layer.

    SGLang's transformers backend keeps them in a plain dictionary, which is no part of the module.
    """
    apart = getattr(model, "attention_instances", None) or {}
    found = [module for module in (*model.modules(), *apart.values()) if isinstance(module, RadixAttention)]
    return sorted(found, key=lambda layer: layer.layer_id)


def softmax_scale(model: torch.nn.Module) -> float:
    """By what all layers multiply the products of queries and keys; :func:`problems` sees that it is one number where
    keys are looked at."""
    return float(attention_layers(model)[0].scaling)


def kv_scales(model: torch.nn.Module, device: str) -> Scales:
    """By what SGLang divides keys and values of a layer before they become FP8, asked for when they are needed.

    On a CPU by nothing: ``torch_native`` leaves scales out where it stores and where it reads.
    """
    if device == "cpu":
        return lambda layer: (1.0, 1.0)
    by_layer = {layer.layer_id: layer for layer in attention_layers(model)}

    def scales(layer: int) -> tuple[float, float]:
        found = by_layer[layer].k_scale_float, by_layer[layer].v_scale_float
        return 1.0 if found[0] is None else found[0], 1.0 if found[1] is None else found[1]

    return scales


def problems(
    model: torch.nn.Module,
    pool: Any,
    *,
    name: str,
    q_heads: int,
    window: int | None,
    model_dtype: torch.dtype,
    record: bool = False,
    kv_dtype_asked: str = "auto",
    attention: Sequence[str] = (),
) -> list[str]:
    """What about a loaded model and its KV pool LSA cannot work with, one line each.

    Args:
        model: as SGLang loaded it.
        pool: the device pool that SGLang built for it.
        name: of the model, for messages.
        q_heads: query heads of a layer on this rank, as the observers of queries have room for them.
        window: tokens of the sliding window that SGLang resolved for its attention backend, None for none.
        model_dtype: of queries.
        record: attention is recorded, which is computed without SGLang's kernels.
        kv_dtype_asked: what ``--kv-cache-dtype`` says.
        attention: backends that read KV.
    """
    if type(pool) not in LAYOUTS:
        return [f"{name}: SGLang keeps its KV in a {type(pool).__name__}: {NOT_YET}: serve it without --lsa flags"]
    if isinstance(pool, DeepSeekV4TokenToKVPool):
        return _deepseek_v4_problems(name, pool)
    layers = attention_layers(model)
    found = _layout_problems(pool) + _dtype_problems(pool, model_dtype) + _order_problems(name, layers, pool)
    found += _scale_problems(name, layers, pool, kv_dtype_asked, attention)
    found += _kind_problems(name, layers, window, record)
    return found + _shape_problems(name, layers, pool, q_heads)


def _deepseek_v4_problems(name: str, pool: DeepSeekV4TokenToKVPool) -> list[str]:
    """Its attention is known; what the pool keeps may be asked for by environment variables."""
    if pool.unified_kv_pool is not None:
        return [f"{name} keeps all KV of a layer in one buffer: {NOT_YET}: unset SGLANG_HACK_FLASHMLA_BACKEND"]
    if type(pool.c4_kv_pool) is not DeepSeekV4SingleKVPool:
        return [f"{name} keeps its entries in a {type(pool.c4_kv_pool).__name__}: {NOT_YET}: remove --enable-hisparse"]
    kv, index = pool.c4_kv_pool.kv_buffer, pool.c4_indexer_kv_pool.index_k_with_scale_buffer
    pages = [len(buffer) for buffer in (*kv, *index)]
    if len(kv) != len(index) or len(set(pages)) != 1:
        return [
            f"{name} has {len(kv)} buffers of entries and {len(index)} of index keys, of {min(pages)} to {max(pages)} "
            "pages: LSA needs one of each for a layer, equally long; please report it"
        ]
    widths = sorted({buffer.shape[1] for buffer in kv}), sorted({buffer.shape[1] for buffer in index})
    if widths != ([KV_ROW], [INDEX_ROW]):
        return [
            f"{name} has rows of {widths[0]} and {widths[1]} bytes a page, LSA reads {KV_ROW} and {INDEX_ROW}: "
            f"{NOT_YET}: use FP8 for KV and index keys"
        ]
    return []


def _layout_problems(pool: MHATokenToKVPool) -> list[str]:
    found = []
    if pool.kv_cache_layout != "nhd":
        found.append(
            f"the KV pool has the layout {pool.kv_cache_layout}, LSA reads nhd: {NOT_YET}: "
            "unset SGLANG_USE_HND_KVCACHE and SGLANG_AITER_KV_CACHE_LAYOUT"
        )
    if pool.post_capture_active:
        found.append(
            f"the KV pool gets its memory after CUDA graphs are captured: {NOT_YET}: "
            "unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
        )
    return found


def _dtype_problems(pool: MHATokenToKVPool, model_dtype: torch.dtype) -> list[str]:
    """The pool's own type: with ``--kv-cache-dtype auto`` the checkpoint may have decided it."""
    kept, computed = (str(dtype).removeprefix("torch.") for dtype in (pool.dtype, model_dtype))
    if pool.dtype in FP8_DTYPES and not pool.is_quantized_kv_cache:
        return []
    if pool.dtype not in KV_DTYPES or pool.store_dtype != pool.dtype:
        return [f"KV is kept in {kept}, as --kv-cache-dtype or the checkpoint asks for: {NOT_YET}: {BFLOAT16}"]
    if pool.k_buffer[0].is_cuda and pool.dtype != model_dtype:
        return [f"KV is kept in {kept}, the model computes in {computed}: {NOT_YET} on a GPU: use --dtype {kept}"]
    return []


def _scale_problems(
    name: str,
    layers: Sequence[RadixAttention],
    pool: MHATokenToKVPool,
    kv_dtype_asked: str,
    attention: Sequence[str],
) -> list[str]:
    """SGLang takes 1 for a scale of FP8 KV that a checkpoint lacks, which is wrong if it was made with another.

    And its FlashInfer backend multiplies by the scales of a checkpoint whatever the pool keeps, though only FP8 was
    divided by them.
    """
    if pool.dtype not in FP8_DTYPES:
        ones = (None, 1.0)
        scaled = [layer.layer_id for layer in layers if {layer.k_scale_float, layer.v_scale_float}.difference(ones)]
        if scaled and "flashinfer" in attention:
            return [
                f"{name} has scales of FP8 KV for {_some(scaled)} of {len(layers)}, and KV is kept in "
                f"{str(pool.dtype).removeprefix('torch.')}, which SGLang's FlashInfer multiplies by them all the same: "
                "use --kv-cache-dtype fp8_e4m3, or --attention-backend fa3 on Hopper"
            ]
        return []
    missing = [layer.layer_id for layer in layers if getattr(layer, "lsa_lacks_scales", layer.k_scale is None)]
    if missing and kv_dtype_asked == "auto":
        return [
            f"{name} asks for FP8 KV and has no scales for {_some(missing)} of {len(layers)}: "
            f"{BFLOAT16}, or --kv-cache-dtype fp8_e4m3 to serve it with scales of 1"
        ]
    if missing:
        where = f"{_some(missing)} of {len(layers)}"
        logger.warning("LSA: %s has no scales of FP8 KV for %s: as SGLang does, 1 is taken", name, where)
    return []


def _order_problems(name: str, layers: Sequence[RadixAttention], pool: MHATokenToKVPool) -> list[str]:
    """Prompts are read layer by layer, while the next one is on its way: each layer must attend, and once."""
    numbers, expected = [layer.layer_id for layer in layers], range(len(pool.k_buffer))
    found = []
    if missing := [number for number in expected if number not in numbers]:
        found.append(f"{name} has no attention in {_some(missing)} of {len(expected)}")
    if repeated := sorted({number for number in numbers if numbers.count(number) > 1}):
        found.append(f"{name} attends more than once with the KV of {_some(repeated)}")
    if foreign := [number for number in numbers if number not in expected]:
        found.append(f"{name} has attention in {_some(foreign)}, its KV pool has {len(expected)} layers")
    return [f"{problem}: {NOT_YET}: use a model with one attention in each layer" for problem in found]


def _kind_problems(name: str, layers: Sequence[RadixAttention], window: int | None, record: bool) -> list[str]:
    """What layers compute beside plain causal attention over all tokens."""
    found = _of_layers(layers, lambda layer: layer.sliding_window_size > 0, "sees a sliding window of tokens only")
    if not found and window is not None and window > 0:
        found = [f"is served with a sliding window of {window} tokens"]
    found += _of_layers(layers, lambda layer: bool(layer.use_irope), "attends within chunks of tokens")
    found += _of_layers(layers, lambda layer: layer.attn_type != AttentionType.DECODER, "looks at later tokens, too")
    found += _of_layers(layers, lambda layer: bool(layer.is_cross_attention), "attends to what an encoder saw")
    found = [f"{name} {problem}: {NOT_YET}: use a dense model" for problem in found]
    scales = sorted({float(layer.scaling) for layer in layers})
    if len(scales) > 1:
        some = ", ".join(f"{scale:g}" for scale in scales[:3])
        found.append(f"{name} scales attention differently in its layers ({some}): {NOT_YET}: use another model")
    if record and any(layer.logit_cap > 0 for layer in layers):
        cap = max(layer.logit_cap for layer in layers)
        found.append(f"{name} caps its attention at {cap:g}: not recorded yet: leave out --lsa-record")
    return found


def _shape_problems(name: str, layers: Sequence[RadixAttention], pool: MHATokenToKVPool, q_heads: int) -> list[str]:
    """Pages of keys and of values are of one size, in all layers, and queries are kept for so many heads."""
    seen = {(layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim) for layer in layers}
    found = []
    if asymmetric := sorted({(key, value) for *_, key, value in seen if key != value}):
        key, value = asymmetric[0]
        found.append(f"{name} has keys of {key} numbers and values of {value}: {NOT_YET}: use another model")
    expected = (q_heads, pool.head_num, pool.head_dim, pool.v_head_dim)
    if not asymmetric and (others := sorted(seen - {expected})):
        words = ["{} query heads, {} KV heads, {} numbers each".format(*shape) for shape in (others[0], expected)]
        found.append(f"{name} has layers of {words[0]}, others of {words[1]}: {NOT_YET}: use another model")
    return found


def _of_layers(layers: Sequence[RadixAttention], does: Callable[[RadixAttention], bool], what: str) -> list[str]:
    numbers = [layer.layer_id for layer in layers if does(layer)]
    return [f"{what} in {_some(numbers)} of {len(layers)}"] if numbers else []


def _some(numbers: Sequence[int]) -> str:
    """Numbers of layers, the first three of them."""
    shown = ", ".join(map(str, numbers[:3]))
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"layer{'s' * (len(numbers) > 1)} {shown}{more}"
