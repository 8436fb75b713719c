"""Architectures that are served in another way than dense models: what they demand of the server, and what they lack.

Works on attributes of SGLang's arguments and ModelConfig; imports no SGLang.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sglang_lsa.config import AUTO, FULL, PAGE_SIZE, LSAConfig, offered
from sglang_lsa.engine.native_index import NativeIndex, scorer_layers
from sglang_lsa.engine.policies import needed
from sglang_lsa.memory.layout import dsv4

DEEPSEEK_V4 = "DeepseekV4ForCausalLM"
NOT_YET = f"not supported with LSA and {DEEPSEEK_V4} yet"
HEAD_DIM, ROPE_DIM, INDEX_DIM, WINDOW = 512, 64, 128, 128
"""By which the rows of its pages are as wide as they are, and its window ends with a page."""

REFUSED_FLAGS: tuple[tuple[str, Any, str], ...] = (
    # beside those that are refused for every model; (attribute, value that is fine, what to do)
    ("attention_backend", "dsv4", "leave the flag out"),
    (
        "prefill_attention_backend",
        None,
        "leave the flag out; if nobody gave it, LSA did, for a model that was not here yet: start the server again",
    ),
    ("decode_attention_backend", None, "leave the flag out"),
    ("kv_cache_dtype", "fp8_e4m3", "leave the flag out"),
    ("enable_dp_attention", False, "remove the flag"),
    ("disable_hybrid_swa_memory", False, "remove the flag"),
    ("enable_deepseek_v4_fp4_indexer", False, "remove the flag: index keys are read in FP8"),
    ("enable_return_indexer_topk", False, "remove the flag: the index numbers entries among resident pages only"),
)


def is_deepseek_v4(model: Any) -> bool:
    """Whether SGLang's ModelConfig is of this architecture; its draft models are others."""
    config = getattr(model, "hf_config", None)
    return (getattr(config, "architectures", None) or [""])[0] == DEEPSEEK_V4


def page_tokens(model: Any) -> int:
    """Tokens of a page of KV."""
    return dsv4.PAGE_TOKENS if is_deepseek_v4(model) else PAGE_SIZE


def native_index(model: Any) -> NativeIndex | None:
    """The index that a model has of its own; None for one that attends to all of its pages."""
    if not is_deepseek_v4(model):
        return None
    text = model.hf_text_config
    return NativeIndex(c4_layers(model), text.index_n_heads, model.index_head_dim, model.hidden_size, model.dtype)


def c4_layers(model: Any) -> tuple[int, ...]:
    """Layers of DeepSeek-V4 that have pages, by their number."""
    return tuple(layer for layer, ratio in enumerate(model.compress_ratios) if ratio == dsv4.RATIO)


def c128_layers(model: Any) -> tuple[int, ...]:
    """Layers of DeepSeek-V4 that keep one entry for 128 tokens, by their number."""
    return tuple(layer for layer, ratio in enumerate(model.compress_ratios) if ratio == 128)


def deepseek_v4_problems(server_args: Any, model: Any, config: LSAConfig) -> list[str]:
    """What cannot work with this architecture, one line each; what no model can work with is not repeated."""
    found = [
        f"--{name.replace('_', '-')} {seen}: {NOT_YET}: {fix}"
        for name, fine, fix in REFUSED_FLAGS
        if (seen := getattr(server_args, name, fine)) != fine
    ]
    if server_args.page_size != dsv4.PAGE_TOKENS:
        found.append(
            f"--page-size {server_args.page_size}: {NOT_YET}: use --page-size {dsv4.PAGE_TOKENS} or leave it out"
        )
    if server_args.device != "cuda":
        found.append(
            f"--device {server_args.device}: {DEEPSEEK_V4} has kernels for NVIDIA GPUs only: use --device cuda"
        )
    graphs = getattr(server_args, "cuda_graph_config", None)
    for phase, fine in (("prefill", ("disabled",)), ("decode", ("disabled", "full"))):
        backend = getattr(getattr(graphs, phase, None), "backend", fine[-1])
        if backend not in fine:
            found.append(f"--cuda-graph-backend-{phase} {backend}: {NOT_YET}: use {fine[-1]}")
    found += _shape_problems(model)
    fitting = offered(config.indexer, True)
    if config.policy not in fitting and not config.policy_is_default:
        found.append(
            f"--lsa-policy {config.policy}: {DEEPSEEK_V4} shows no queries and keys of attention: use one of "
            f"{', '.join(fitting)}, or leave the flag out"
        )
    if config.record is not None:
        found.append(f"--lsa-record {config.record}: {NOT_YET}: its index needs no such training")
    if config.auto:
        found.append(f"--lsa-budget {AUTO}: {NOT_YET}: use a number in (0, 1]")
    if config.groups is True:
        found.append(f"groups: {NOT_YET}: leave it out")
    if config.prefill != "exact":
        found.append(f"--lsa-prefill {config.prefill}: {NOT_YET}: use exact")
    if not found:
        try:
            scorer_layers(config, NativeIndex(c4_layers(model), 0, 0, 0, model.dtype))
        except ValueError as error:
            found.append(str(error))
    return found


def with_own_index(config: LSAConfig) -> LSAConfig:
    """The configuration for a model that has an index of its own: its first policy, where none was asked for."""
    names = [policy.name for policy in needed(config, index=True)]
    return config if config.policy in (*names, FULL) else dataclasses.replace(config, policy=names[0])


def _shape_problems(model: Any) -> list[str]:
    name = model.model_path
    if not c4_layers(model):
        return [f"{name} has no layer that keeps one entry for {dsv4.RATIO} tokens: there is nothing to page"]
    if other := sorted(set(model.compress_ratios) - {0, dsv4.RATIO, 128}):
        return [f"{name} has layers that keep one entry for {other[0]} tokens: {NOT_YET}: use ratios 0, 4 and 128"]
    seen = (model.head_dim, model.qk_rope_head_dim, model.index_head_dim, model.window_size)
    expected = (HEAD_DIM, ROPE_DIM, INDEX_DIM, WINDOW)
    if seen != expected:
        words = [
            "head_dim {}, qk_rope_head_dim {}, index_head_dim {}, sliding_window {}".format(*s)
            for s in (seen, expected)
        ]
        return [f"{name} has {words[0]}: {NOT_YET}: use a model with {words[1]}"]
    return []


def named_architecture(arguments: Mapping[str, Any]) -> str | None:
    """What the model of these arguments is, from its configuration on this machine; None if there is none yet.

    For defaults that must be there before SGLang reads it. Without one they are those of a dense model, and where that
    cannot work the server says so.
    """
    model, path = arguments.get("model_path"), None
    if not model:
        return None
    if pathlib.Path(model).is_dir():
        path = pathlib.Path(model) / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(model, "config.json", revision=arguments.get("revision"))
        except ValueError:  # no name of a repository
            return None
        path = pathlib.Path(found) if isinstance(found, str) else None
    try:
        read = json.loads(path.read_text()) if path is not None else {}
        return (read.get("architectures") or [None])[0]
    except (OSError, ValueError, AttributeError):
        return None
