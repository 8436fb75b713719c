"""Models by what SGLang makes of them, not by what their configuration names: served, or refused after a look."""

from __future__ import annotations

import pathlib

import pytest
import torch
from soak import NARROW

from sglang_lsa.server_process import LSA, ServerFailed, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
WINDOW = 64
FLAGS = ["--dtype", "float32", "--skip-tokenizer-init", "--skip-server-warmup", "--lsa-device-tokens", "2048"]
FLAGS += ["--lsa-host-memory-gb", "0.1", "--lsa-min-context", "256", "--lsa-debug", *NARROW]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model whose configuration names a sliding window, like that of Mistral-7B-v0.1."""
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(7)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = MistralConfig(vocab_size=512, **shape, **heads, sliding_window=WINDOW, initializer_range=0.2)
    MistralForCausalLM(config).save_pretrained(folder)
    return str(folder)


def generated(model_path: str, prompt: list[int], tokens: int, window: int | None) -> list[int]:
    """What transformers answers, greedily, with a window or without."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, sliding_window=window).eval()
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return answer[0, len(prompt) :].tolist()


def test_a_window_that_sglang_does_not_use_is_no_reason_to_refuse(mistral: str, tmp_path: pathlib.Path) -> None:
    prompt = torch.randint(3, 512, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    dense, windowed = (generated(mistral, prompt, 24, window) for window in (None, WINDOW))
    assert dense != windowed, "the prompt does not tell the two apart"
    sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    with ServerProcess(LSA, ["--model-path", mistral, *FLAGS], tmp_path / "log") as server:
        server.wait_until_ready()
        for budget in (1.0, 0.3):
            parameters = {**sampling, "custom_params": {"lsa": {"budget": budget}}}
            answer = server.post("/generate", {"input_ids": prompt, "sampling_params": parameters})
            assert len(answer["output_ids"]) == 24
            assert budget < 1.0 or answer["output_ids"] == dense


def test_what_only_a_loaded_model_shows_ends_the_server_with_a_word(mistral: str, tmp_path: pathlib.Path) -> None:
    """SGLang's own environment variable lays KV out by heads, which no argument tells."""
    environment = {"SGLANG_USE_HND_KVCACHE": "1"}
    with ServerProcess(LSA, ["--model-path", mistral, *FLAGS], tmp_path / "log", environment) as server:
        with pytest.raises(ServerFailed):
            server.wait_until_ready()
        assert server.process.returncode == 1
    log = (tmp_path / "log").read_text()
    words = (
        "sglang-lsa: LSA cannot start:\n  the KV pool has the layout hnd, LSA reads nhd: not supported with LSA yet: "
    )
    assert words + "unset SGLANG_USE_HND_KVCACHE" in log
    assert "model_guard" not in log, "the words stand alone, not in a traceback"
