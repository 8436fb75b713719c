"""A tiny DeepSeek-V4: every size that a kernel is made for is that of DeepSeek-V4-Flash, the others are small.

Tried with SGLang 0.5.17 on one Hopper GPU, with drawn weights in bfloat16 (3 to 4 GB): ``LAUNCH`` and ``ENVIRONMENT``
start it. On a CPU its configuration can be read by SGLang, but not be served.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

PAGE_TOKENS = 256
"""SGLang takes no other page size for this architecture."""
COMPRESS_RATIOS = (0, 4, 128, 4, 128, 4)
C4_LAYERS = tuple(layer for layer, ratio in enumerate(COMPRESS_RATIOS) if ratio == 4)
"""Layers that have pages: 1, 3, 5."""
KV_ROW, INDEX_ROW = 37_440, 8_448
"""Bytes of a page in one of them: 64 entries of KV, and of index keys."""
PAGE_BYTES = len(C4_LAYERS) * (KV_ROW + INDEX_ROW)
CONTEXT = 262_144
VOCABULARY = 32_768

TINY: Mapping[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "num_hidden_layers": len(COMPRESS_RATIOS),
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
    "compress_ratios": list(COMPRESS_RATIOS),
    "compress_rope_theta": 160_000,
    "rope_theta": 10_000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65_536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1_048_576,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 512,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "num_hash_layers": 1,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attention_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
}

FLASH_RATIOS = (0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(41)))
"""43 layers: 2 with a window only, 21 of ratio 4, 20 of ratio 128."""
FLASH: Mapping[str, Any] = {
    **TINY,
    "num_hidden_layers": len(FLASH_RATIOS),
    "compress_ratios": list(FLASH_RATIOS),
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "num_hash_layers": 3,
    "vocab_size": 129_280,
}
"""Sizes of DeepSeek-V4-Flash, for plans; nobody loads it here."""

ENVIRONMENT: Mapping[str, str] = {"SGLANG_OPT_FP8_WO_A_GEMM": "0"}
LAUNCH: Sequence[str] = (
    "--load-format=dummy",
    "--skip-tokenizer-init",
    f"--context-length={CONTEXT}",
    f"--page-size={PAGE_TOKENS}",
    "--max-running-requests=8",
    "--chunked-prefill-size=4096",
    "--cuda-graph-max-bs-decode=8",
    "--cuda-graph-backend-prefill=disabled",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--swa-full-tokens-ratio=0.05",
    "--random-seed=1",
)
"""Beside ``--model-path``, ``--port`` and ``--mem-fraction-static``, for SGLang and for LSA alike."""


def write_config(folder: pathlib.Path, base: Mapping[str, Any] = TINY, **changes: Any) -> pathlib.Path:
    """A model's folder with nothing but ``config.json``: ``base`` with ``changes``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**base, **changes}, indent=1))
    return folder
