"""HostMirror: one host copy of every complete page, indexed by virtual page."""

from __future__ import annotations

import atexit
import logging
import math
import mmap
import pathlib
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch
from tqdm import tqdm

from sglang_lsa.memory.numa import spread

logger = logging.getLogger(__name__)

GB = 1 << 30
LOCK_AT_ONCE = GB
"""Bytes that are page-locked with one call, at most; what the progress bar counts in."""
LOCKED_UNIT = 4096
"""Bytes of a page of the operating system, which can be locked only once."""
TOUCH_AT_ONCE = 64 << 20
THREADS = 8


class HostMirror:
    """Host memory, uint8 ``[virtual_pages + 1, page_bytes]``; slot ``v`` holds virtual page ``v``.

    There is no second allocator: whoever owns the virtual page owns the slot.

    Args:
        pinned: page-lock the memory, so that a GPU reads and writes it at the speed of the bus.

    Raises:
        ValueError: the machine (or its container) has not that much memory, or does not let it be locked; nothing is
            left allocated.
    """

    def __init__(self, virtual_pages: int, page_bytes: int, pinned: bool = False):
        total = (virtual_pages + 1) * page_bytes
        require_host_memory(total, "the host mirror", "lower --lsa-host-memory-gb")
        self.page_bytes = page_bytes
        unit = math.lcm(page_bytes, LOCKED_UNIT)
        self.locked_together = max(1, LOCK_AT_ONCE // unit) * unit // page_bytes
        """Pages that one call locks: CUDA's copy engines refuse to copy what two calls locked, kernels do not mind."""
        self.locked: list[int] = []
        if pinned:
            flat = _huge_pages(total)
            self._lock(flat)
            logger.info("LSA: host mirror of %.1f GB on NUMA %s", total / GB, spread(flat.data_ptr()) or "(not told)")
            self.pages = flat.view(virtual_pages + 1, page_bytes)
        else:
            self.pages = torch.empty((virtual_pages + 1, page_bytes), dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return self.pages.numel()

    def _lock(self, flat: torch.Tensor) -> None:
        """Give every page of ``flat`` real memory, with several threads, and lock it, with a progress bar."""
        cudart = torch.cuda.cudart()
        atexit.register(self.unlock)
        bar = tqdm(total=len(flat), desc="LSA: locking host memory", unit="B", unit_scale=True, unit_divisor=1024)
        at_once = self.locked_together * self.page_bytes
        with ThreadPoolExecutor(THREADS) as threads, bar:
            for start in range(0, len(flat), at_once):
                part = flat[start : start + at_once]
                list(threads.map(torch.Tensor.zero_, part.split(TOUCH_AT_ONCE)))
                error = cudart.cudaHostRegister(part.data_ptr(), len(part), 0)
                if int(error) != 0:
                    self.unlock()
                    raise ValueError(
                        f"locking {len(flat) / GB:.1f} GB of host memory failed after {start / GB:.1f} GB "
                        f"({cudart.cudaGetErrorString(error)}): lower --lsa-host-memory-gb, or raise the limit on "
                        "locked memory (ulimit -l)"
                    )
                self.locked.append(part.data_ptr())
                bar.update(len(part))

    def unlock(self) -> None:
        """Give locked memory back to the operating system's care; a second call does nothing."""
        while self.locked:
            torch.cuda.cudart().cudaHostUnregister(self.locked.pop())


def _huge_pages(nbytes: int) -> torch.Tensor:
    """Uninitialised uint8 ``[nbytes]``, in huge pages where the system has them: they are faster to lock."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            logger.debug("no huge pages for the host mirror")
    return torch.frombuffer(memory, dtype=torch.uint8)


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
