"""Pools of servers that are started for a known set of prompts.

What a server takes by default is for whoever comes: all of the device's memory, and half of the host's, which takes a
minute or more to be locked.
"""

from __future__ import annotations

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.pages import align_up

BYTES = 4
"""Of a number of the KV, at most."""
LEAST_TOKENS = 16_384
LEAST_GB = 0.25


def pool_flags(model: str, longest: int, prompts: int, server_args: str) -> list[str]:
    """Flags for a device pool of so many prompts of ``longest`` tokens, and a mirror of twice as many.

    Args:
        model: path or hub name.
        server_args: a pool or a mirror that is named there is left as it is.
    """
    from transformers import AutoConfig

    from sglang_lsa.patches.models import shape_of

    if "--lsa-config" in server_args:
        return []
    tokens = align_up(max(LEAST_TOKENS, prompts * longest), PAGE_SIZE)
    shape = shape_of(AutoConfig.from_pretrained(model).get_text_config())
    per_token = 2 * shape.num_hidden_layers * shape.kv_heads * shape.head_dim * BYTES
    flags = []
    if "--lsa-device-" not in server_args:
        flags += ["--lsa-device-tokens", str(tokens)]
    if "--lsa-host-memory-gb" not in server_args:
        flags += ["--lsa-host-memory-gb", f"{max(LEAST_GB, 2 * tokens * per_token / 1e9):.2f}"]
    return flags
