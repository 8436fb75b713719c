"""Model shapes to benchmark: a configuration is enough, the weights are SGLang's dummies."""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from typing import Any

KV_BYTES = {"auto": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of one element of a key or value, by type of KV."""


@dataclass(frozen=True)
class Shape:
    """A Llama of this shape, in bfloat16."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 128256

    def token_bytes(self, kv_dtype: str = "auto") -> int:
        """KV bytes of one token.

        Args:
            kv_dtype: as SGLang's ``--kv-cache-dtype`` takes it.
        """
        return self.layers * 2 * self.kv_heads * self.head_dim * KV_BYTES[kv_dtype]

    def write(self, folder: pathlib.Path, context: int) -> pathlib.Path:
        """Write ``config.json`` for contexts of up to ``context`` tokens; returns the folder."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.name == "1b",
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1b", layers=16, hidden=2048, intermediate=8192, q_heads=32, kv_heads=8, head_dim=64),
        Shape("8b", layers=32, hidden=4096, intermediate=14336, q_heads=32, kv_heads=8, head_dim=128),
        Shape("70b", layers=80, hidden=8192, intermediate=28672, q_heads=64, kv_heads=8, head_dim=128),
        Shape("tiny", 2, hidden=256, intermediate=512, q_heads=4, kv_heads=2, head_dim=64, vocabulary=4096),
    )
}
"""Llama 3.2 1B, Llama 3.1 8B and 70B, and one that a machine without a GPU runs."""
