"""What a model's configuration decides, before anything is loaded: configurations as models have them."""

from __future__ import annotations

import ast
import json
import pathlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from release import HERE
from sglang.srt.configs.model_config import ModelConfig

from sglang_lsa.config import LSAConfig
from sglang_lsa.patches.models import WINDOWED, model_problems, seen_after_load
from sglang_lsa.patches.releases import NEWEST

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config_of(folder: pathlib.Path, architecture: str, model_type: str, **values: Any) -> ModelConfig:
    config = {**SMALL, "architectures": [architecture], "model_type": model_type, **values}
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig(str(folder))


@pytest.mark.parametrize(
    ("architecture", "model_type", "values"),
    [
        ("MistralForCausalLM", "mistral", {"sliding_window": 128}),
        ("Phi3ForCausalLM", "phi3", {"sliding_window": 128}),
        ("Starcoder2ForCausalLM", "starcoder2", {"sliding_window": 128}),
        ("Qwen2ForCausalLM", "qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1}),
        ("GraniteForCausalLM", "granite", {"attention_multiplier": 0.015625}),
        (
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            {"layer_types": ["attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 32, "num_local_experts": 0},
        ),
        ("Olmo2ForCausalLM", "olmo2", {}),
    ],
    ids=["mistral", "phi3", "starcoder2", "qwen2", "granite", "granite 4 without mamba", "olmo2"],
)
def test_models_that_sglang_serves_densely_are_not_refused(
    architecture: str, model_type: str, values: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    model = config_of(tmp_path, architecture, model_type, **values)
    assert model_problems(model, LSAConfig()) == []
    notes = seen_after_load(SimpleNamespace(kv_cache_dtype="auto", get_model_config=lambda: model, _model_config=model))
    assert len(notes) == ("sliding_window" in values)
    assert all("names a sliding window of 128 tokens: whether SGLang's model has it is seen when" in n for n in notes)


def test_a_plan_says_that_heads_are_looked_for_when_the_model_is_loaded(tmp_path: pathlib.Path) -> None:
    model = config_of(tmp_path, "Olmo2ForCausalLM", "olmo2")

    def notes(**values: Any) -> list[str]:
        config = LSAConfig(**values)
        given = {"kv_cache_dtype": "auto", "lsa_config": config, "get_model_config": lambda: model}
        return seen_after_load(SimpleNamespace(**given, _model_config=model))

    (note,) = notes(calibrate="cached")
    assert "looked for when it is loaded (--lsa-calibrate cached)" in note
    assert notes(calibrate="never") == notes(calibrate="cached", policy="quest") == []


def test_a_policy_for_models_with_an_index_is_refused_without_one(tmp_path: pathlib.Path) -> None:
    model = config_of(tmp_path, "Olmo2ForCausalLM", "olmo2")
    (problem,) = model_problems(model, LSAConfig(policy="native"))
    assert "--lsa-policy native" in problem
    assert "has no index of its own: use one of quest, recency, random, full" in problem


WINDOW = "has sliding-window attention"
STATE = "has state-space or linear-attention layers"


@pytest.mark.parametrize(
    ("architecture", "model_type", "values", "words"),
    [
        ("Gemma2ForCausalLM", "gemma2", {"sliding_window": 128}, WINDOW),
        ("Gemma3ForCausalLM", "gemma3_text", {"sliding_window": 128}, WINDOW),
        ("Olmo3ForCausalLM", "olmo3", {"sliding_window": 128}, WINDOW),
        ("Cohere2ForCausalLM", "cohere2", {"sliding_window": 128}, WINDOW),
        ("Exaone4ForCausalLM", "exaone4", {"sliding_window": 128}, WINDOW),
        ("GptOssForCausalLM", "gpt_oss", {"sliding_window": 128, "max_position_embeddings": 131072}, WINDOW),
        ("Llama4ForCausalLM", "llama4_text", {"attention_chunk_size": 128}, "attends within chunks of 128 tokens"),
        ("DeepseekV3ForCausalLM", "deepseek_v3", {"kv_lora_rank": 16, "v_head_dim": 16}, "has MLA attention"),
        ("LlamaForCausalLM", "llama", {"v_head_dim": 32}, "has keys of 16 numbers and values of 32"),
        ("FalconH1ForCausalLM", "falcon_h1", {}, STATE),
        ("Lfm2ForCausalLM", "lfm2", {"layer_types": ["conv", "full_attention"]}, STATE),
        ("Qwen3NextForCausalLM", "qwen3_next", {}, STATE),
        ("MiniMaxM3SparseForCausalLM", "llama", {}, "has sparse-attention layers"),
        ("Qwen2VLForConditionalGeneration", "qwen2_vl", {}, "takes more than text"),
        ("BertModel", "bert", {}, "does not generate text"),
    ],
)
def test_models_that_surely_cannot_work(
    architecture: str, model_type: str, values: dict[str, Any], words: str, tmp_path: pathlib.Path
) -> None:
    (problem,) = model_problems(config_of(tmp_path, architecture, model_type, **values), LSAConfig())
    assert problem.startswith(f"{tmp_path} {words}")


NEWER = {"ExaoneMoeForCausalLM", "Spark2_5ForCausalLM"}
"""Windowed models that only SGLang 0.5.23 has."""
NOT_LISTED = {
    "BeamForCausalLM": "hybrid by SGLang's word",
    "CohereForCausalLM": "the model before Cohere2, without windows",
    "DFlash2BeamDraftModel": "speculative decoding",
    "DFlash2DraftModel": "speculative decoding",
    "DFlashDraftModel": "speculative decoding",
    "DFlashLagunaForCausalLM": "speculative decoding",
    "DiffusionGemmaForBlockDiffusion": "hybrid by SGLang's word",
    "EmbeddingGemma2Model": "does not generate",
    "EmbeddingGemmaModel": "does not generate",
    "Gemma4AssistantForCausalLM": "speculative decoding",
    "Gemma4UnifiedAssistantForCausalLM": "speculative decoding",
    "GraniteForCausalLM": "has windows as GraniteSWAForCausalLM only",
    "GraniteMoeForCausalLM": "has windows as GraniteMoeSWAForCausalLM only",
    "GraniteMoeSWAForCausalLM": "hybrid by SGLang's word",
    "GraniteMoeSharedForCausalLM": "has windows as GraniteMoeSWAForCausalLM only",
    "GraniteSWAForCausalLM": "hybrid by SGLang's word",
    "IQuestQ1ForCausalLM": "hybrid by SGLang's word",
    "IQuestLoopCoderForCausalLM": "names its window otherwise; refused when it is loaded",
    "InklingForConditionalGeneration": "hybrid by SGLang's word",
    "InklingForConditionalGenerationMTP": "hybrid by SGLang's word",
    "JetNemotronForCausalLM": "keeps state",
    "LlamaForCausalLMEagle3": "speculative decoding",
    "MiMoV2MTP": "hybrid by SGLang's word",
    "MiniMaxDFlash2DraftModel": "speculative decoding",
    "MuseGlimmerAssistantModel": "speculative decoding",
    "MuseGlimmerForCausalLM": "hybrid by SGLang's word",
    "MuseGlimmerForConditionalGeneration": "hybrid by SGLang's word",
    "NemotronHForCausalLM": "keeps state",
    "NemotronHPuzzleForCausalLM": "keeps state",
    "UnlimitedOCRForCausalLM": "hybrid by SGLang's word",
}


def models_with_windows() -> Iterator[str]:
    """Architectures that the modules of SGLang's models register which give their attention a window."""
    import sglang.srt.models as models

    for path in sorted(pathlib.Path(models.__path__[0]).glob("*.py")):
        source = path.read_text()
        if "sliding_window_size=" not in source and "def get_attention_sliding_window_size" not in source:
            continue
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "EntryClass":
                entries = statement.value.elts if isinstance(statement.value, ast.List) else [statement.value]
                yield from (ast.unparse(entry) for entry in entries)


def test_every_windowed_model_of_sglang_is_known() -> None:
    # SGLang's transformers backend stands for any model; what it has is seen when it is loaded.
    found = {name for name in models_with_windows() if not name.startswith("Transformers")}
    assert len(found) > 20
    assert sorted(found - set(WINDOWED) - set(NOT_LISTED)) == []
    assert set(WINDOWED) - found == (set() if HERE == NEWEST else NEWER)
