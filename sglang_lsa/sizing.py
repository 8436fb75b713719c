"""Memory plan: how many tokens the device pool and the host mirror hold, decided before anything is allocated."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.pages import align_up
from sglang_lsa.radix_ext.host_mirror import GB, available_host_memory, require_host_memory

logger = logging.getLogger(__name__)

HOST_SHARE = {"cpu": 0.2, "cuda": 0.6}
"""Part of the free host memory that the mirror takes unless told otherwise. On a CPU the model lives there, too."""


def round_up_gb(bytes_: int) -> float:
    """GB with two digits, never less than ``bytes_``."""
    return math.ceil(bytes_ / GB * 100) / 100


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in tokens, multiples of the page size."""

    physical_tokens: int
    virtual_tokens: int
    token_bytes: int


def plan_memory(
    config: LSAConfig, *, token_bytes: int, budgeted_tokens: int, context_tokens: int, device: str
) -> MemoryPlan:
    """Size device pool and host mirror.

    Args:
        token_bytes: KV bytes of one token, all layers.
        budgeted_tokens: what SGLang's own memory fraction (or ``--max-total-tokens``) allows on the device.
        context_tokens: longest context of the model.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: more host memory is asked for than is free, or the pools would be too small to serve anything.
    """
    if config.host_memory_gb is not None:
        host_bytes = int(config.host_memory_gb * GB)
        require_host_memory(host_bytes, f"--lsa-host-memory-gb {config.host_memory_gb}", "lower it")
    else:
        host_bytes = int(available_host_memory() * HOST_SHARE[device])
    virtual = host_bytes // token_bytes // PAGE_SIZE * PAGE_SIZE - PAGE_SIZE
    if config.device_tokens is not None:
        physical = config.device_tokens
    elif config.device_memory_gb is not None:
        physical = int(config.device_memory_gb * GB) // token_bytes
    elif device == "cpu":  # SGLang would take nearly all memory; a quarter of the mirror, but one whole context
        physical = min(virtual, max(virtual // 4, context_tokens + 2 * PAGE_SIZE))
    else:
        physical = budgeted_tokens
    physical = min(physical, budgeted_tokens) // PAGE_SIZE * PAGE_SIZE
    if physical < 4 * PAGE_SIZE:
        raise ValueError(
            f"the device pool would hold {physical} tokens ({physical * token_bytes / GB:.3f} GB): "
            f"give it at least {4 * PAGE_SIZE} tokens ({4 * PAGE_SIZE * token_bytes / GB:.3f} GB)"
        )
    if virtual < physical:
        raise ValueError(
            f"the host mirror would hold {virtual} tokens ({host_bytes / GB:.2f} GB), fewer than the device pool's "
            f"{physical}: raise --lsa-host-memory-gb to {round_up_gb(align_up(physical + PAGE_SIZE) * token_bytes)} or "
            "more, or lower --lsa-device-tokens"
        )
    logger.info(
        "LSA: device pool %d tokens (%.2f GB), host mirror %d tokens (%.2f GB), %d KV bytes a token",
        physical,
        physical * token_bytes / GB,
        virtual,
        virtual * token_bytes / GB,
        token_bytes,
    )
    return MemoryPlan(physical, virtual, token_bytes)
