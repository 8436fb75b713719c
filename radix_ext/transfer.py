"""transfer: page copies between device pool and host mirror; at once on a CPU, on streams of their own on a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sglang_lsa.kernels.page_copy import copy_pages_triton, pages_from_host, pages_to_host, pool_addresses

Finished = Callable[[], None]


class Transfer(Protocol):
    """Moves pages. ``finished`` is called when a copy is done: at once, or from a later :meth:`poll`."""

    recall_seconds: float
    recalled_pages: int

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        """Copy device pages to the mirror, after everything that is queued for the device now."""

    def recall(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        """Copy mirror pages to the device; nothing queued for the device may touch these device pages."""

    def poll(self) -> None:
        """Call ``finished`` of every copy that is done. Never waits."""

    def wait(self) -> None:
        """Wait for every copy, and call its ``finished``."""

    def before_next_kernel(self) -> None:
        """What is queued for the device from now on sees every recall issued so far."""


class HostTransfer:
    """Both sides are host memory: copies are done when the call returns."""

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], mirror: torch.Tensor):
        self.keys, self.values, self.mirror = keys, values, mirror
        self.recall_seconds = 0.0
        self.recalled_pages = 0

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        p, v = torch.from_numpy(physical), torch.from_numpy(virtual)
        pages_to_host(self.keys, self.values, p, self.mirror, v)
        finished()

    def recall(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        p, v = torch.from_numpy(physical), torch.from_numpy(virtual)
        pages_from_host(self.keys, self.values, p, self.mirror, v)
        self.recalled_pages += len(physical)
        finished()

    def poll(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def before_next_kernel(self) -> None:
        pass


@dataclass
class _Copy:
    began: torch.cuda.Event
    ended: torch.cuda.Event
    finished: Finished
    recalled: int
    ids: tuple[torch.Tensor, torch.Tensor]
    """Page ids on the device, alive as long as the copy reads them."""


class StreamTransfer:
    """Asynchronous copies. Stores wait for what the compute stream has queued; recalls wait for nothing.

    Args:
        compute: returns the stream on which the model runs.
    """

    def __init__(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        mirror: torch.Tensor,
        compute: Callable[[], torch.cuda.Stream],
    ):
        self.addresses = pool_addresses(keys, values)
        self.mirror, self.compute = mirror, compute
        self.stores = torch.cuda.Stream()
        self.recalls = torch.cuda.Stream()
        self.storing: deque[_Copy] = deque()
        self.recalling: deque[_Copy] = deque()
        self.recall_seconds = 0.0
        self.recalled_pages = 0

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        self.stores.wait_stream(self.compute())
        self.storing.append(self._copy(self.stores, physical, virtual, finished, to_host=True))

    def recall(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        self.recalling.append(self._copy(self.recalls, physical, virtual, finished, to_host=False))

    def _copy(self, stream, physical, virtual, finished, *, to_host: bool) -> _Copy:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            p, v = upload(np.stack((physical, virtual)), self.addresses.device)
            began.record()
            copy_pages_triton(self.addresses, p, self.mirror, v, to_host=to_host)
            ended.record()
        return _Copy(began, ended, finished, 0 if to_host else len(physical), (p, v))

    def poll(self) -> None:
        for copies in (self.storing, self.recalling):
            while copies and copies[0].ended.query():
                self._finish(copies.popleft())

    def wait(self) -> None:
        self.stores.synchronize()
        self.recalls.synchronize()
        self.poll()

    def before_next_kernel(self) -> None:
        self.compute().wait_stream(self.recalls)

    def _finish(self, copy: _Copy) -> None:
        if copy.recalled:
            self.recalled_pages += copy.recalled
            self.recall_seconds += copy.began.elapsed_time(copy.ended) / 1000
        copy.finished()


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """``values`` on the device, ordered after what the current stream has queued; the host does not wait."""
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory().to(device, non_blocking=True)


def ids_on(device: torch.device, ids: np.ndarray) -> torch.Tensor:
    """Page ids where the kernels of this device can read them."""
    return upload(ids, device) if device.type == "cuda" else torch.from_numpy(ids)
