"""HostMirror: one host copy of every complete page, indexed by virtual page."""

from __future__ import annotations

import pathlib

import psutil
import torch

GB = 1 << 30


class HostMirror:
    """Host memory ``[virtual_pages + 1, layers, 2, page, kv_heads, head_dim]``; slot ``v`` holds virtual page ``v``.

    There is no second allocator: whoever owns the virtual page owns the slot.

    Raises:
        ValueError: the machine (or its container) has not that much memory; nothing was allocated.
    """

    def __init__(self, virtual_pages: int, layers: int, page: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        shape = (virtual_pages + 1, layers, 2, page, kv_heads, head_dim)
        self.page_bytes = layers * 2 * page * kv_heads * head_dim * dtype.itemsize
        require_host_memory((virtual_pages + 1) * self.page_bytes, "the host mirror", "lower --lsa-host-memory-gb")
        self.pages = torch.empty(shape, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.pages.numel() * self.pages.element_size()


def available_host_memory() -> int:
    """Bytes that this process may still take: what the machine has free, or its container's limit leaves."""
    return min([psutil.virtual_memory().available, *_container_headroom()])


def require_host_memory(wanted: int, what: str, fix: str) -> None:
    """Refuse an allocation that the machine cannot hold, before it is made."""
    available = available_host_memory()
    if wanted > available:
        raise ValueError(f"{what} needs {wanted / GB:.1f} GB of host memory, {available / GB:.1f} GB are free: {fix}")


def _container_headroom() -> list[int]:
    """Bytes left under the memory limit of cgroup v2 or v1, if there is one."""
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            bound, used = (pathlib.Path(path).read_text().strip() for path in (limit, usage))
        except OSError:
            continue
        if bound.isdigit():
            return [int(bound) - int(used)]
    return []
