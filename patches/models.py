"""What a model's configuration tells before anything is loaded: what surely cannot work, and what is still to be seen.

Works on the attributes of SGLang's ModelConfig. The loaded model is looked at by :mod:`sglang_lsa.patches.model_guard`.
"""

from __future__ import annotations

from typing import Any

from sglang_lsa.config import FULL, LSAConfig, looks_at_index, offered
from sglang_lsa.engine.observe import observed_layers
from sglang_lsa.indexer.checkpoint import ModelShape
from sglang_lsa.indexer.expectation import NO_EXPECTATION
from sglang_lsa.indexer.model import MemoryIndexer

WINDOWED = (
    "AfmoeForCausalLM",
    "Cohere2ForCausalLM",
    "Cohere2MoeForCausalLM",
    "Exaone4ForCausalLM",
    "ExaoneMoEForCausalLM",
    "ExaoneMoeForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma3nForCausalLM",
    "Gemma3nForConditionalGeneration",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "GptOssForCausalLM",
    "LagunaForCausalLM",
    "MellumForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MiMoV2ForCausalLM",
    "Olmo2ForCausalLM",
    "Spark2_5ForCausalLM",
    "Step3p5ForCausalLM",
)
"""Models of SGLang whose layers see the window that their configuration names. It has others, which ignore it."""


WITHOUT = (
    ", or leave the flag out and add --lsa-calibrate cached: heads of this model that choose pages are then found "
    "when the server starts"
)
"""What can be served without an indexer that fits the model."""


def model_problems(model: Any, config: LSAConfig) -> list[str]:
    """What about the model surely cannot work, one line each, before anything of it is loaded.

    Args:
        model: SGLang's ModelConfig.
    """
    from sglang_lsa.patches.model_guard import other_cache  # imports SGLang, which has made the model's configuration

    problems = []
    name, text = model.model_path, model.hf_text_config
    if model.is_hybrid_swa or (model.sliding_window_size is not None and _is_windowed(model)):
        problems.append(f"{name} has sliding-window attention: not supported with LSA yet: use a dense model")
    elif model.attention_chunk_size is not None:
        problems.append(
            f"{name} attends within chunks of {model.attention_chunk_size} tokens: not supported with LSA yet: "
            "use a dense model"
        )
    if model.attention_arch.name != "MHA":
        problems.append(
            f"{name} has {model.attention_arch.name} attention: not supported with LSA yet: use an MHA/GQA model"
        )
    elif model.head_dim != model.v_head_dim:
        problems.append(
            f"{name} has keys of {model.head_dim} numbers and values of {model.v_head_dim}: not supported with LSA "
            "yet: use another model"
        )
    if (layers := other_cache(model)) is not None:
        problems.append(f"{name} has {layers} layers: not supported with LSA yet: use a dense model")
    if getattr(model, "is_multimodal", False):
        problems.append(f"{name} takes more than text: not supported with LSA yet: use a text model")
    if not model.is_generation:
        problems.append(f"{name} does not generate text: serve it without LSA")
    if looks_at_index(config.policy):
        others = ", ".join(offered(config.indexer))
        problems.append(f"--lsa-policy {config.policy}: {name} has no index of its own: use one of {others}")
    try:
        if config.indexer:
            of_indexer = MemoryIndexer.load(config.indexer).config
            of_indexer.require_model(shape_of(text), f"--lsa-indexer {config.indexer}", WITHOUT)
            if config.auto and config.policy != FULL and of_indexer.expectation is None:
                problems.append(f"--lsa-{NO_EXPECTATION}")
        observed_layers(config, text.num_hidden_layers)
    except ValueError as error:
        problems.append(str(error))
    return problems


def seen_after_load(server_args: Any) -> list[str]:
    """What the configuration names and only a loaded model shows; the server refuses it then if need be."""
    from sglang_lsa.patches.resolved import resolved

    server_args = resolved(server_args)
    model, notes = server_args.get_model_config(), []
    if model.sliding_window_size is not None and not _is_windowed(model):
        notes.append(
            f"its configuration names a sliding window of {model.sliding_window_size} tokens: whether SGLang's model "
            "has it is seen when it is loaded, and the server refuses it then"
        )
    if (config := getattr(server_args, "lsa_config", None)) is not None and config.calibrates:
        notes.append(
            "neither --lsa-policy nor --lsa-indexer is named: heads that choose pages are looked for when it is loaded "
            f"(--lsa-calibrate {config.calibrate}); page keys and queries are planned here as Quest has them, which "
            "serves if none is found, and a budget of auto as its largest sets"
        )
    if server_args.kv_cache_dtype == "auto" and model.quantization is not None:
        notes.append(
            f"it is quantized ({model.quantization}): whether it asks for FP8 KV is seen when it is loaded; the pools "
            "then hold more tokens than planned here, as --kv-cache-dtype fp8_e4m3 shows"
        )
    return notes


def _is_windowed(model: Any) -> bool:
    return any(architecture in WINDOWED for architecture in model.hf_config.architectures or ())


def shape_of(text: Any) -> ModelShape:
    """Of a Hugging Face configuration of a text model."""
    q_heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // q_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or q_heads
    return ModelShape(text.hidden_size, text.num_hidden_layers, q_heads, kv_heads, head_dim)
