"""page_copy: whole pages between the layer-first device pool and the page-contiguous host mirror."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pages_to_host(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    physical: torch.Tensor,
    mirror: torch.Tensor,
    virtual: torch.Tensor,
) -> None:
    """Copy device pages ``physical`` into mirror pages ``virtual``.

    Args:
        keys, values: per layer ``[physical_pages * page, kv_heads, head_dim]``, the pool's buffers.
        physical, virtual: int64 ``[n]`` on the CPU.
        mirror: ``[virtual_pages + 1, layers, 2, page, kv_heads, head_dim]`` host memory.
    """
    _check(keys, values, mirror)
    page = mirror.shape[3]
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        mirror[virtual, layer, 0] = _paged(k, page)[physical].to(mirror.device)
        mirror[virtual, layer, 1] = _paged(v, page)[physical].to(mirror.device)


def pages_from_host(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    physical: torch.Tensor,
    mirror: torch.Tensor,
    virtual: torch.Tensor,
) -> None:
    """Copy mirror pages ``virtual`` into device pages ``physical``; arguments as in :func:`pages_to_host`."""
    _check(keys, values, mirror)
    page = mirror.shape[3]
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        _paged(k, page)[physical] = mirror[virtual, layer, 0].to(k.device)
        _paged(v, page)[physical] = mirror[virtual, layer, 1].to(v.device)


def _paged(buffer: torch.Tensor, page: int) -> torch.Tensor:
    return buffer.view(buffer.shape[0] // page, page, *buffer.shape[1:])


def _check(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], mirror: torch.Tensor) -> None:
    if len(keys) != mirror.shape[1] or len(values) != mirror.shape[1] or mirror.shape[2] != 2:
        raise ValueError(
            f"mirror {tuple(mirror.shape)} does not fit {len(keys)} layers of keys and {len(values)} of values: "
            "shape it [pages, layers, 2, page, kv_heads, head_dim]"
        )
