"""A tiny DeepSeek-V4: every size that a kernel is made for is that of DeepSeek-V4-Flash, the others are small.

Tried with SGLang 0.5.17 on one Hopper GPU, with drawn weights in bfloat16 (3 to 4 GB): ``LAUNCH``, and
``ENVIRONMENT`` of the benchmark, start it. On a CPU its configuration can be read by SGLang, but not be served.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_lsa.bench.dsv4_shapes import FLASH as COMMON

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
    **COMMON,
    "num_hidden_layers": len(COMPRESS_RATIOS),
    "compress_ratios": list(COMPRESS_RATIOS),
    "max_position_embeddings": 1_048_576,
    "n_routed_experts": 32,
    "moe_intermediate_size": 512,
    "num_hash_layers": 1,
    "vocab_size": VOCABULARY,
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
