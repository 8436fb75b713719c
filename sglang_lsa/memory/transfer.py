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

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> None:
        """Copy mirror pages to the device; nothing queued for the device may touch these device pages.

        ``layer_by_layer``: first layers first, so that :meth:`before_layer` has something to wait for.
        """

    def poll(self) -> None:
        """Call ``finished`` of every copy that is done. Never waits."""

    def wait(self) -> None:
        """Wait for every copy, and call its ``finished``."""

    def before_next_kernel(self) -> None:
        """What is queued for the device from now on sees every recall issued so far."""

    def gate_layers(self) -> None:
        """The same for a forward pass that calls :meth:`before_layer` before each layer: it need not wait for all
        layers of what comes layer by layer."""

    def before_layer(self, layer: int) -> None:
        """A pass that was gated is about to read this layer."""


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

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> None:
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

    def gate_layers(self) -> None:
        pass

    def before_layer(self, layer: int) -> None:
        pass


@dataclass
class _Copy:
    began: torch.cuda.Event
    ended: torch.cuda.Event
    finished: Finished
    recalled: int
    ids: tuple[torch.Tensor, torch.Tensor]
    """Page ids on the device, alive as long as the copy reads them."""
    layers: list[torch.cuda.Event]
    """One for each layer, when they come one after the other."""


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
        self._gates: list[list[torch.cuda.Event]] = []
        self.recall_seconds = 0.0
        self.recalled_pages = 0

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        self.stores.wait_stream(self.compute())
        self.storing.append(self._copy(self.stores, physical, virtual, finished, True))

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> None:
        self.recalling.append(self._copy(self.recalls, physical, virtual, finished, False, layer_by_layer))

    def _copy(self, stream, physical, virtual, finished, to_host: bool, layer_by_layer: bool = False) -> _Copy:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        layers: list[torch.cuda.Event] = []
        with torch.cuda.stream(stream):
            p, v = upload(np.stack((physical, virtual)), self.addresses.device)
            began.record()
            if layer_by_layer:
                for layer in range(len(self.addresses)):
                    copy_pages_triton(self.addresses, p, self.mirror, v, to_host=to_host, layer=layer)
                    layers.append(torch.cuda.Event())
                    layers[-1].record()
            else:
                copy_pages_triton(self.addresses, p, self.mirror, v, to_host=to_host)
            ended.record()
        return _Copy(began, ended, finished, 0 if to_host else len(physical), (p, v), layers)

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

    def gate_layers(self) -> None:
        self._gates = [copy.layers for copy in self.recalling if copy.layers]
        whole = [copy.ended for copy in self.recalling if not copy.layers]
        if whole:  # copies of one stream end in their order
            self.compute().wait_event(whole[-1])

    def before_layer(self, layer: int) -> None:
        for layers in self._gates:
            self.compute().wait_event(layers[layer])
        if layer == len(self.addresses) - 1:
            self._gates = []

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
