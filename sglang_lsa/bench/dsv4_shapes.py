"""Shapes of DeepSeek-V4 to benchmark: a configuration is enough, the weights are drawn."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sglang_lsa.engine.sizing_dsv4 import C128_ROW, ENTRY, INDEX_ENTRY, MAP_BYTES
from sglang_lsa.memory.layout.dsv4 import INDEX_ROW, KV_ROW, PAGE_TOKENS

C4_RING = 16
"""Compression states that a layer with an entry for 4 tokens keeps of a page of the window."""
ENVIRONMENT: Mapping[str, str] = {"SGLANG_OPT_FP8_WO_A_GEMM": "0"}
"""Of all servers: SGLang's default takes weights that only a checkpoint in FP8 has."""
FLASH: Mapping[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "sliding_window": 128,
    "compress_rope_theta": 160_000,
    "rope_theta": 10_000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65_536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1_100_000,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attention_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
}
"""What every shape has in common: all sizes that SGLang's kernels are made for."""

WEIGHTS: Mapping[str, Mapping[str, Any]] = {
    "bfloat16": {},
    "fp8": {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    },
}
"""What a configuration says about the type of its weights."""


@dataclass(frozen=True)
class Dsv4Shape:
    """A DeepSeek-V4.

    Attributes:
        name: for ``--models``, and in the results.
        ratios: of every layer, tokens to an entry; 0 for a layer with a window only.
        experts, intermediate: routed experts, and the width of one.
    """

    name: str
    ratios: tuple[int, ...]
    experts: int
    intermediate: int
    hash_layers: int
    vocabulary: int

    @cached_property
    def c4_layers(self) -> int:
        return self.ratios.count(4)

    @cached_property
    def c128_layers(self) -> int:
        return self.ratios.count(128)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of entries and index keys: what is paged."""
        return self.c4_layers * (KV_ROW + INDEX_ROW)

    @property
    def rest_bytes(self) -> int:
        """Bytes of the layers with an entry for 128 tokens, of one page of the context."""
        return self.c128_layers * C128_ROW

    @property
    def scored_bytes(self) -> int:
        """Bytes of the index keys that are kept of every page, for the layers that choose pages."""
        return min(3, self.c4_layers) * INDEX_ROW

    @property
    def virtual_bytes(self) -> int:
        """Device bytes of every page that the host mirror has room for."""
        return self.rest_bytes + self.scored_bytes + PAGE_TOKENS * MAP_BYTES

    @property
    def token_bytes(self) -> float:
        """What SGLang's budget counts for one token, the window and compression states left out."""
        return (ENTRY + INDEX_ENTRY) * self.c4_layers / 4 + ENTRY * self.c128_layers / 128

    @property
    def window_token_bytes(self) -> float:
        """The same for one token of the window, with the states that come with it."""
        states = self.c4_layers * C4_RING / PAGE_TOKENS * 4 * (512 + 128) * 4
        return ENTRY * len(self.ratios) + states

    def nominal_share(self, kept: float) -> float:
        """GPU share of growing KV as the paper counts it: entries without padding, index keys of the layers that
        choose pages only where the page itself is absent.

        Args:
            kept: share of the pages that is on the device.
        """
        paged = (ENTRY + INDEX_ENTRY) * self.c4_layers / 4
        rest = ENTRY * self.c128_layers / 128
        scored = min(3, self.c4_layers) * INDEX_ENTRY / 4 * (1 - kept)
        return (kept * paged + rest + scored) / (paged + rest)

    def share(self, kept: float) -> float:
        """The same with every byte that grows with the context, padding and maps included."""
        return (kept * self.page_bytes + self.virtual_bytes) / (self.page_bytes + self.rest_bytes)

    def write(self, folder: pathlib.Path, weights: str = "bfloat16") -> pathlib.Path:
        """Write ``config.json``; returns the folder.

        Args:
            weights: one of :data:`WEIGHTS`.
        """
        config = {
            **FLASH,
            "num_hidden_layers": len(self.ratios),
            "compress_ratios": list(self.ratios),
            "n_routed_experts": self.experts,
            "moe_intermediate_size": self.intermediate,
            "num_hash_layers": self.hash_layers,
            "vocab_size": self.vocabulary,
            **WEIGHTS[weights],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder


FLASH_RATIOS = (0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(41)))
"""43 layers: 2 with a window only, 21 with an entry for 4 tokens, 20 with one for 128."""
DSV4_SHAPES = {
    shape.name: shape
    for shape in (
        Dsv4Shape("rank", FLASH_RATIOS, experts=256, intermediate=256, hash_layers=3, vocabulary=129_280),
        Dsv4Shape("tiny", (0, 4, 128, 4, 128, 4), experts=32, intermediate=512, hash_layers=1, vocabulary=32_768),
    )
}
"""One rank of DeepSeek-V4-Flash on 8 GPUs: all layers and experts, an eighth of each expert. SGLang keeps all of the KV
on every rank, so that one GPU has the KV and the attention of a rank. And the tiny model of the tests."""
