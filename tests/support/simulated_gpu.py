"""A GPU whose streams run when they are told to: passes, stores and recalls in any order that CUDA's rules allow."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.transfer import Finished

LAYERS = 2


@dataclass
class Recall:
    """A copy to the device. It waits for nothing that the compute stream does."""

    physical: np.ndarray
    virtual: np.ndarray
    finished: Finished
    layered: bool
    total: int
    """Layers that have pages."""
    layers: int = 0
    """Layers that have arrived."""

    @property
    def done(self) -> bool:
        return self.layers == self.total


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


@dataclass
class Call:
    """Something else that is queued behind passes."""

    run: Callable[[], None]


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

    Two rules hold whoever says what runs next: the items of a stream run in their order, and an item runs after what
    it waits for.
    """

    pager: Pager
    chance: random.Random = field(default_factory=random.Random)
    """What :meth:`progress` asks."""
    late_stores: bool = True
    """Copies to the mirror take time, too; else they are done when they are asked for."""
    compute: list[Pass | Call | Event] = field(default_factory=list)
    computed: int = 0
    stores: list[Store] = field(default_factory=list)
    stored: int = 0
    recalls: list[Recall] = field(default_factory=list)
    recalled: int = 0
    recall_seconds: float = 0.0
    recalled_pages: int = 0
    calls: collections.Counter[str] = field(default_factory=collections.Counter)
    """How often the pager made somebody wait."""
    _told: tuple[int, int] = (0, 0)
    """Stores and recalls whose end the host knows."""
    _whole: int = 0
    _layered: list[Recall] = field(default_factory=list)

    def __post_init__(self) -> None:
        pager = self.pager
        pager.transfer, pager.asynchronous = self, True
        pager.compute, pager.new_event = lambda: None, lambda: Event(self)
        # In numpy: torch's indexing of a few pages costs several times as much.
        mirror, layers = pager.mirror.pages.numpy(), pager.layout.by_layer.values()
        self._pieces = [
            [(piece.buffer.numpy(), mirror[:, piece.offset : piece.offset + piece.nbytes]) for piece in pieces]
            for pieces in layers
        ]
        """By layer: of every piece the device's bytes by page, and the mirror's."""

    # -- what the pager calls ------------------------------------------------------------------------------------

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        self.stores.append(Store(physical.copy(), virtual.copy(), finished, len(self.compute)))
        if not self.late_stores:
            self.finish(stores=1)

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> int:
        self.recalls.append(Recall(physical.copy(), virtual.copy(), finished, layer_by_layer, len(self._pieces)))
        return len(self.recalls)

    @property
    def busy(self) -> bool:
        return self._told != (len(self.stores), len(self.recalls))

    def ended(self) -> tuple[int, int]:
        return self.stored, self.recalled

    def notice(self, stores: int, recalls: int) -> None:
        self.calls["notice"] += 1
        stored, recalled = self._told
        self._told = (stores, recalls)
        for store in self.stores[stored:stores]:
            store.finished()
        for recall in self.recalls[recalled:recalls]:
            recall.finished()
            self.recalled_pages += len(recall.physical)

    def wait(self) -> None:
        self.calls["wait"] += 1
        self.finish(len(self.storing), len(self.recalling))

    def before_next_kernel(self, recalls: int) -> None:
        self.calls["before_next_kernel"] += 1
        self._whole = max(self._whole, recalls)

    def gate_layers(self) -> None:
        self.calls["gate_layers"] += 1
        on_their_way = self.recalls[self.recalled :]
        self._layered = [recall for recall in on_their_way if recall.layered]
        whole = [place for place, recall in enumerate(on_their_way, self.recalled + 1) if not recall.layered]
        self._whole = max([self._whole, *whole])

    def before_layer(self, layer: int) -> None:
        raise AssertionError("passes wait by what they were queued with")

    # -- what the model calls ------------------------------------------------------------------------------------

    def queue(self, run: Callable[[int], None], prefill: bool) -> None:
        """Queue a forward pass. Only a prefill looks at the gates of layers."""
        self.compute.append(Pass(run, self._whole, self._layered if prefill else []))
        if prefill:
            self._layered = []

    def call(self, run: Callable[[], None]) -> None:
        """Queue something behind the passes that are queued now."""
        self.compute.append(Call(run))

    # -- time ----------------------------------------------------------------------------------------------------

    @property
    def storing(self) -> list[Store]:
        """Copies to the mirror that have not ended."""
        return self.stores[self.stored :]

    @property
    def recalling(self) -> list[Recall]:
        """Copies to the device that have not ended."""
        return self.recalls[self.recalled :]

    def finish(self, stores: int = 0, recalls: int = 0) -> None:
        """Let so many more copies end, or as many as there are, and let the host know."""
        for _ in range(min(stores, len(self.storing))):
            self._store()
        self._recall_to(min(self.recalled + recalls, len(self.recalls)))
        self.notice(*self.ended())

    def arrive(self) -> None:
        """Let all that is on its way to the device arrive, and let the host know."""
        self.finish(recalls=len(self.recalling))

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
        elif isinstance(item, Call):
            item.run()
        self.computed += 1

    def _store(self) -> None:
        store = self.stores[self.stored]
        self.compute_to(store.after)
        for pieces in self._pieces:
            for buffer, part in pieces:
                part[store.virtual] = buffer[store.physical]
        self.stored += 1

    def _recall_to(self, place: int) -> None:
        while self.recalled < place:
            self._recall()

    def _recall(self) -> None:
        recall = self.recalls[self.recalled]
        for layer in range(recall.layers, recall.layers + 1 if recall.layered else recall.total):
            for buffer, part in self._pieces[layer]:
                buffer[recall.physical] = part[recall.virtual]
            recall.layers = layer + 1
        self.recalled += recall.done
