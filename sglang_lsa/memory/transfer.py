"""transfer: page copies between device pool and host mirror; at once on a CPU, on streams of their own on a GPU."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sglang_lsa.kernels.page_move import Move, move_pages_reference, move_pages_triton, moves
from sglang_lsa.memory.layout.base import KVLayout, Piece

Finished = Callable[[], None]


class Transfer(Protocol):
    """Moves pages. ``finished`` is called when a copy is done: at once, or from a later :meth:`notice`."""

    recall_seconds: float
    recalled_pages: int

    @property
    def busy(self) -> bool:
        """Whether there are copies whose ``finished`` was not called."""

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        """Copy device pages to the mirror, after everything that is queued for the device now."""

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> int:
        """Copy mirror pages to the device; nothing queued for the device may touch these device pages.

        ``layer_by_layer``: first layers first, so that :meth:`before_layer` has something to wait for.

        Returns:
            Which recall this is, counted since the start from 1; 0 where copies are done when they are asked for.
        """

    def ended(self) -> tuple[int, int]:
        """How many stores and how many recalls are done, of the oldest and counted since the start. Never waits."""

    def notice(self, stores: int, recalls: int) -> None:
        """Call ``finished`` of so many, counted since the start, unless that has been; all of them are done."""

    def wait(self) -> None:
        """Wait for every copy, and call its ``finished``."""

    def before_next_kernel(self, recalls: int) -> None:
        """What is queued for the device from now on sees so many recalls, of the oldest and counted since the start."""

    def gate_layers(self) -> None:
        """The same for a forward pass that calls :meth:`before_layer` before each layer: it need not wait for all
        layers of what comes layer by layer."""

    def before_layer(self, layer: int) -> None:
        """A pass that was gated is about to read this layer."""


class HostTransfer:
    """Both sides are host memory: copies are done when the call returns.

    Args:
        layout: of the device pool.
        mirror: uint8 ``[virtual_pages + 1, page_bytes]``.
    """

    def __init__(self, layout: KVLayout, mirror: torch.Tensor):
        self.mirror, self.moves = mirror, moves_of(layout.pieces, mirror)
        self.recall_seconds = 0.0
        self.recalled_pages = 0

    @property
    def busy(self) -> bool:
        return False

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        p, v = torch.from_numpy(physical), torch.from_numpy(virtual)
        move_pages_reference(self.moves, p, self.mirror, v, to_host=True)
        finished()

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> int:
        p, v = torch.from_numpy(physical), torch.from_numpy(virtual)
        move_pages_reference(self.moves, p, self.mirror, v, to_host=False)
        self.recalled_pages += len(physical)
        finished()
        return 0

    def ended(self) -> tuple[int, int]:
        return 0, 0

    def notice(self, stores: int, recalls: int) -> None:
        pass

    def wait(self) -> None:
        pass

    def before_next_kernel(self, recalls: int) -> None:
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
    layers: dict[int, torch.cuda.Event]
    """One for each layer that has pages, when they come one after the other."""


class StreamTransfer:
    """Asynchronous copies. Stores wait for what the compute stream has queued; recalls wait for nothing.

    Args:
        layout: of the device pool.
        mirror: uint8 ``[virtual_pages + 1, page_bytes]``, page-locked.
        compute: returns the stream on which the model runs.
    """

    def __init__(self, layout: KVLayout, mirror: torch.Tensor, compute: Callable[[], torch.cuda.Stream]):
        self.device = layout.device
        self.moves = moves_of(layout.pieces, mirror)
        self.layer_moves = {layer: moves_of(pieces, mirror) for layer, pieces in layout.by_layer.items()}
        self.last_layer = max(self.layer_moves)
        self.mirror, self.compute = mirror, compute
        self.stores = torch.cuda.Stream()
        self.recalls = torch.cuda.Stream()
        self.storing: deque[_Copy] = deque()
        self.recalling: deque[_Copy] = deque()
        self.stored = self.recalled = 0
        """Copies whose ``finished`` was called."""
        self._gates: list[dict[int, torch.cuda.Event]] = []
        self.recall_seconds = 0.0
        self.recalled_pages = 0

    @property
    def busy(self) -> bool:
        return bool(self.storing or self.recalling)

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        self.stores.wait_stream(self.compute())
        self.storing.append(self._copy(self.stores, physical, virtual, finished, True))

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> int:
        self.recalling.append(self._copy(self.recalls, physical, virtual, finished, False, layer_by_layer))
        return self.recalled + len(self.recalling)

    def _copy(self, stream, physical, virtual, finished, to_host: bool, layer_by_layer: bool = False) -> _Copy:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        layers: dict[int, torch.cuda.Event] = {}
        with torch.cuda.stream(stream):
            p, v = upload(np.stack((physical, virtual)), self.device)
            began.record()
            if layer_by_layer:
                for layer, of_layer in self.layer_moves.items():
                    move_pages_triton(of_layer, p, self.mirror, v, to_host=to_host)
                    layers[layer] = torch.cuda.Event()
                    layers[layer].record()
            else:
                move_pages_triton(self.moves, p, self.mirror, v, to_host=to_host)
            ended.record()
        return _Copy(began, ended, finished, 0 if to_host else len(physical), (p, v), layers)

    def ended(self) -> tuple[int, int]:
        return self.stored + _ended(self.storing), self.recalled + _ended(self.recalling)

    def notice(self, stores: int, recalls: int) -> None:
        while self.stored < stores:
            self.stored += 1
            self.storing.popleft().finished()
        while self.recalled < recalls:
            self.recalled += 1
            copy = self.recalling.popleft()
            self.recalled_pages += copy.recalled
            self.recall_seconds += copy.began.elapsed_time(copy.ended) / 1000
            copy.finished()

    def wait(self) -> None:
        self.stores.synchronize()
        self.recalls.synchronize()
        self.notice(*self.ended())

    def before_next_kernel(self, recalls: int) -> None:
        if recalls > self.recalled:  # copies of one stream end in their order
            self.compute().wait_event(self.recalling[recalls - self.recalled - 1].ended)

    def gate_layers(self) -> None:
        self._gates = [copy.layers for copy in self.recalling if copy.layers]
        whole = [copy.ended for copy in self.recalling if not copy.layers]
        if whole:  # copies of one stream end in their order
            self.compute().wait_event(whole[-1])

    def before_layer(self, layer: int) -> None:
        for layers in self._gates:
            if layer in layers:
                self.compute().wait_event(layers[layer])
        if layer == self.last_layer:
            self._gates = []


def _ended(copies: Iterable[_Copy]) -> int:
    """How many of these, oldest first, are done."""
    return sum(1 for _ in itertools.takewhile(lambda copy: copy.ended.query(), copies))


def moves_of(pieces: Iterable[Piece], mirror: torch.Tensor) -> tuple[Move, ...]:
    """What moves these pieces of pages between their buffers and the mirror."""
    pieces = list(pieces)
    return moves([piece.buffer for piece in pieces], [piece.offset for piece in pieces], mirror)


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """``values`` on the device, ordered after what the current stream has queued; the host does not wait."""
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory().to(device, non_blocking=True)


def ids_on(device: torch.device, ids: np.ndarray) -> torch.Tensor:
    """Page ids where the kernels of this device can read them."""
    return upload(ids, device) if device.type == "cuda" else torch.from_numpy(ids)
