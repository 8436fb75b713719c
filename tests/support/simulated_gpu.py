"""A GPU whose streams run when they are told to: passes, stores and recalls in any order that CUDA's rules allow."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.radix_ext.transfer import Finished

LAYERS = 2


@dataclass
class Recall:
    """A copy to the device. It waits for nothing that the compute stream does."""

    physical: np.ndarray
    virtual: np.ndarray
    finished: Finished
    layered: bool
    layers: int = 0
    """Layers that have arrived."""

    @property
    def done(self) -> bool:
        return self.layers == LAYERS


@dataclass
class Store:
    """A copy to the mirror, behind everything that the compute stream had queued."""

    physical: np.ndarray
    virtual: np.ndarray
    finished: Finished
    after: int
    """Items of the compute stream before it."""


@dataclass
class Pass:
    """A forward pass: ``run(layer)`` for each layer, in order."""

    run: Callable[[int], None]
    whole: int
    """Recalls that it waits for before it begins."""
    layered: list[Recall]
    """Recalls of which each of its layers waits for that layer."""
    layers: int = 0


class Event:
    """As ``torch.cuda.Event``: done when the compute stream has come to where it was recorded."""

    def __init__(self, gpu: SimulatedGPU):
        self.gpu, self.place = gpu, 0

    def record(self, stream: object) -> None:
        self.gpu.compute.append(self)
        self.place = len(self.gpu.compute)

    def query(self) -> bool:
        return self.gpu.computed >= self.place

    def synchronize(self) -> None:
        self.gpu.compute_to(self.place)


@dataclass
class SimulatedGPU:
    """The transfer of a pager, and the stream that its passes run on. Bytes move when an item runs, not before.

    Two rules hold whatever ``chance`` says: the items of a stream run in their order, and an item runs after what it
    waits for.
    """

    pager: Pager
    chance: random.Random
    compute: list[Pass | Event] = field(default_factory=list)
    computed: int = 0
    stores: list[Store] = field(default_factory=list)
    stored: int = 0
    recalls: list[Recall] = field(default_factory=list)
    recalled: int = 0
    recall_seconds: float = 0.0
    recalled_pages: int = 0
    _told: tuple[int, int] = (0, 0)
    """Stores and recalls whose end the host knows."""
    _whole: int = 0
    _layered: list[Recall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pager.transfer, self.pager.asynchronous = self, True
        self.pager.compute, self.pager.new_event = lambda: None, lambda: Event(self)

    # -- what the pager calls ------------------------------------------------------------------------------------

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        self.stores.append(Store(physical.copy(), virtual.copy(), finished, len(self.compute)))

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> None:
        self.recalls.append(Recall(physical.copy(), virtual.copy(), finished, layer_by_layer))
        self.recalled_pages += len(physical)

    def poll(self) -> None:
        stored, recalled = self._told
        self._told = (self.stored, self.recalled)
        for copy in (*self.stores[stored : self.stored], *self.recalls[recalled : self.recalled]):
            copy.finished()

    def wait(self) -> None:
        while self.stored < len(self.stores):
            self._store()
        self._recall_to(len(self.recalls))
        self.poll()

    def before_next_kernel(self) -> None:
        self._whole = len(self.recalls)

    def gate_layers(self) -> None:
        on_their_way = self.recalls[self.recalled :]
        self._layered = [recall for recall in on_their_way if recall.layered]
        whole = [place for place, recall in enumerate(self.recalls) if not recall.layered]
        self._whole = max(self._whole, whole[-1] + 1 if whole else 0)

    def before_layer(self, layer: int) -> None:
        raise AssertionError("passes wait by what they were queued with")

    # -- what the model calls ------------------------------------------------------------------------------------

    def queue(self, run: Callable[[int], None], prefill: bool) -> None:
        """Queue a forward pass. Only a prefill looks at the gates of layers."""
        self.compute.append(Pass(run, self._whole, self._layered if prefill else []))
        if prefill:
            self._layered = []

    # -- time ----------------------------------------------------------------------------------------------------

    def progress(self, items: int) -> None:
        """Let so many items, or layers of them, run; ``chance`` says of which streams."""
        for _ in range(items):
            ready = [
                step
                for step, left in (
                    (self._compute, self.computed < len(self.compute)),
                    (self._store, self.stored < len(self.stores)),
                    (self._recall, self.recalled < len(self.recalls)),
                )
                if left
            ]
            if ready:
                self.chance.choice(ready)()

    def compute_to(self, place: int) -> None:
        """Wait until the compute stream has come to its item ``place``."""
        while self.computed < place:
            self._compute()

    def _compute(self) -> None:
        item = self.compute[self.computed]
        if isinstance(item, Pass):
            self._recall_to(item.whole)
            while any(recall.layers <= item.layers for recall in item.layered):
                self._recall()
            item.run(item.layers)
            item.layers += 1
            if item.layers < LAYERS:
                return
        self.computed += 1

    def _store(self) -> None:
        store = self.stores[self.stored]
        self.compute_to(store.after)
        for layer in range(LAYERS):
            for which, pool in enumerate((self.pager.keys, self.pager.values)):
                self.pager.mirror.pages[store.virtual, layer, which] = _by_page(pool[layer])[store.physical]
        self.stored += 1

    def _recall_to(self, place: int) -> None:
        while self.recalled < place:
            self._recall()

    def _recall(self) -> None:
        recall = self.recalls[self.recalled]
        for layer in range(recall.layers, recall.layers + 1 if recall.layered else LAYERS):
            for which, pool in enumerate((self.pager.keys, self.pager.values)):
                _by_page(pool[layer])[recall.physical] = self.pager.mirror.pages[recall.virtual, layer, which]
            recall.layers = layer + 1
        self.recalled += recall.done


def _by_page(pool):
    return pool.view(-1, PAGE_SIZE, 1, 1)
