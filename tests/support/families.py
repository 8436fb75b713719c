"""Small random models of the families that people serve: real architectures, drawn weights, no download.

SGLang's own dummy weights (``--load-format dummy``) are too small to show anything: attention is then a plain average
of nothing much, and the next token depends on the last one alone. These are drawn so that attention decides.
"""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from serving import Answer, answer_tokens

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.server_process import ServerProcess

VOCABULARY = 512
CONTEXT = 32_768


@dataclass(frozen=True)
class Size:
    """Of a model.

    Attributes:
        sharpness: deviation of what queries and keys are multiplied by; the larger, the fewer tokens are attended to,
            and the more the rounding of one layer moves the next.
    """

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    sharpness: float

    @property
    def hidden(self) -> int:
        return self.q_heads * self.head_dim


TINY = Size(layers=2, q_heads=4, kv_heads=2, head_dim=16, sharpness=2.0)
"""For a CPU, in float32."""
SMALL = Size(layers=4, q_heads=8, kv_heads=2, head_dim=128, sharpness=1.2)
"""With heads that kernels of a GPU are made for, in bfloat16, for which they come compiled. Rounding moves
log-probabilities by 0.02 to 0.03 in the mean, leaving out all but the last 300 of 1,000 tokens by 0.3 to 0.6
(transformers on a CPU)."""

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 1024}

FAMILIES: dict[str, tuple[str, Callable[[Size], dict[str, Any]]]] = {
    "llama": ("llama", lambda size: {"head_dim": size.head_dim, "rope_parameters": LLAMA3}),
    "qwen2.5": ("qwen2", lambda size: {}),
    "qwen3": ("qwen3", lambda size: {"head_dim": size.head_dim}),
    "qwen3-moe": (
        "qwen3_moe",
        lambda size: {
            "head_dim": size.head_dim,
            "moe_intermediate_size": size.hidden,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "mistral": ("mistral", lambda size: {"head_dim": size.head_dim, "sliding_window": None}),
    "glm4": ("glm4", lambda size: {"head_dim": size.head_dim, "attention_bias": True, "pad_token_id": 0}),
    "granite": (
        "granite",
        lambda size: {
            "attention_multiplier": 1.25 / size.head_dim**0.5,
            "embedding_multiplier": 0.5,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
        },
    ),
    "phi3": ("phi3", lambda size: {"pad_token_id": 0}),
}
"""Type of a family's model, and what its configuration has beside that of others."""


def write_model(folder: pathlib.Path, family: str, size: Size, dtype: torch.dtype) -> str:
    """Write configuration and weights of a model, the same ones every time; returns the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, own = FAMILIES[family]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": 2 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.q_heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": CONTEXT,
    }
    config = AutoConfig.for_model(
        model_type, **shape, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, **own(size)
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean, deviation = _distribution(name, weight, size.sharpness)
            weight.copy_(torch.randn(weight.shape, generator=draw) * deviation + mean)
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def _distribution(name: str, weight: torch.Tensor, sharpness: float) -> tuple[float, float]:
    """Mean and deviation of a weight: what comes out of a projection is of the size of what went in, but for queries
    and keys; and what the layers after attention add is smaller, so that attention decides."""
    if "q_norm" in name or "k_norm" in name:
        return sharpness, 0.1
    if weight.dim() == 1:
        return float("norm" in name), 0.1
    if "embed_tokens" in name:
        return 0.0, 1.0
    makes_queries = any(part in name for part in ("q_proj", "k_proj", "qkv_proj"))
    factor = sharpness if makes_queries else 0.3 if "down_proj" in name else 1.0
    return 0.0, factor / weight.shape[-1] ** 0.5


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Token ids of these models, different for every seed."""
    rng = random.Random(seed)
    return [rng.randrange(3, VOCABULARY) for _ in range(tokens)]


@dataclass(frozen=True)
class Answered:
    """What a server says to a prompt.

    Attributes:
        prompt: logarithmic probabilities of the prompt's tokens but the first.
        answer: greedy tokens, each with its best candidates.
    """

    prompt: np.ndarray
    answer: Answer

    @property
    def tokens(self) -> list[int]:
        return [token for token, _ in self.answer]

    @property
    def chances(self) -> np.ndarray:
        """Logarithmic probabilities of all tokens but the first."""
        return np.array([*self.prompt, *(chances[token] for token, chances in self.answer)])


def ask(server: ServerProcess, prompt: list[int], tokens: int, rid: str | None = None, **lsa: object) -> Answered:
    """A greedy answer of exactly so many tokens, with all log-probabilities."""
    parameters: dict[str, object] = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    if lsa:
        parameters["custom_params"] = {"lsa": lsa}
    body = {"input_ids": prompt, "sampling_params": parameters, "return_logprob": True, "logprob_start_len": 0}
    body |= {"top_logprobs_num": 5} | ({"rid": rid} if rid else {})
    meta = server.post("/generate", body)["meta_info"]
    return Answered(np.array([value for value, _, _ in meta["input_token_logprobs"][1:]]), answer_tokens(meta))


class Reference:
    """The same model in transformers, in float32 on a CPU: nothing of it is SGLang's or ours."""

    def __init__(self, folder: str):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def read(self, text: list[int], sets: str = "") -> torch.Tensor:
        """Logarithmic probabilities of what follows each token of a text, ``[tokens, vocabulary]``.

        Args:
            sets: which pages the tokens of the answer read, as ``/lsa/requests`` tells; all of them by default.
        """
        mask = visible(len(text), sets)[None, None] if sets else None
        return self.model(torch.tensor([text]), attention_mask=mask).logits[0].log_softmax(-1)


def visible(tokens: int, sets: str) -> torch.Tensor:
    """Which tokens each token sees, ``[tokens, tokens]``, where the later ones read resident sets
    (``tokens:tail_start:p,p,p`` with ``;`` between sets)."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril_()
    for part in sets.split(";"):
        context, tail_start, positions = part.split(":")
        rows = slice(int(context) - 1, None)  # a set is read until the next one takes its place
        seen = torch.zeros(tokens, dtype=torch.bool)
        seen[int(tail_start) * PAGE_SIZE :] = True
        for page in filter(None, positions.split(",")):
            seen[int(page) * PAGE_SIZE : (int(page) + 1) * PAGE_SIZE] = True
        mask[rows] = seen
    return mask.tril_()
