"""page_keys: what the selector remembers of a page. Here Quest's bounds: minimum and maximum of its keys."""

from __future__ import annotations

import torch


def key_bounds(keys: torch.Tensor) -> torch.Tensor:
    """Elementwise bounds of the keys of each page.

    Args:
        keys: ``[pages, tokens, kv_heads, head_dim]``, post-RoPE, any float type.

    Returns:
        ``[pages, 2, kv_heads, head_dim]``: minimum, then maximum, in the type of ``keys``.

    Source: Tang et al., Quest (ICML 2024), section 3.2.
    """
    return torch.stack((keys.amin(dim=1), keys.amax(dim=1)), dim=1)
