"""LSA's server of two ranks on one CPU; things go wrong on rank 1 alone: ``python -m tensor_parallel [flags]``.

Both ranks copy as a GPU does: what is queued ends some steps later, at times that each rank draws for itself, and on
rank 1 late. A prompt whose id begins with ``oom`` finds no memory on rank 1.
"""

from __future__ import annotations

import os
import pathlib
import random
from collections import deque
from typing import Any

import numpy as np
import torch
from families import TINY, Size, write_model

from sglang_lsa import launch_server
from sglang_lsa.engine.prefill import Prefill
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.transfer import Finished, HostTransfer

SUPPORT = pathlib.Path(__file__).resolve().parent
ENVIRONMENT = {"SGLANG_NCCL_SO_PATH": "/nonexistent", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
"""SGLang starts PyNccl if it finds its library, and gives each rank a NUMA node of its own."""
FLAGS = ["--tp-size", "2", "--disable-custom-all-reduce", "--dtype", "float32"]
FLAGS += ["--skip-tokenizer-init", "--skip-server-warmup", "--chunked-prefill-size", "512"]
QWEN = Size(layers=2, q_heads=14, kv_heads=2, head_dim=16, sharpness=2.0)
"""Heads as of Qwen2.5-0.5B."""
SHAPES = {"llama": TINY, "qwen2.5": QWEN}
UNTIL = {0: 2, 1: 12}
"""By rank: a copy is known to be done after so many looks at most."""


def model(folder: pathlib.Path, family: str) -> str:
    return write_model(folder, family, SHAPES[family], torch.float32)


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    return {**ENVIRONMENT, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


class LateTransfer(HostTransfer):
    """Copies are made at once, and known to be done later."""

    def __init__(self, made: HostTransfer, rank: int):
        vars(self).update(vars(made))
        self.chance, self.until = random.Random(rank), UNTIL[rank]
        self.storing: deque[Finished] = deque()
        self.recalling: deque[Finished] = deque()
        self.stored = self.recalled = 0
        self.told = [0, 0]

    @property
    def busy(self) -> bool:
        return bool(self.storing or self.recalling)

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        super().store(physical, virtual, lambda: None)
        self.storing.append(finished)

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> None:
        super().recall(physical, virtual, lambda: None, layer_by_layer)
        self.recalling.append(finished)

    def ended(self) -> tuple[int, int]:
        """Sometimes one more has."""
        most = self.told[0] + len(self.storing), self.told[1] + len(self.recalling)
        if not self.chance.randrange(self.until):
            self.stored, self.recalled = min(self.stored + 1, most[0]), min(self.recalled + 1, most[1])
        return self.stored, self.recalled

    def notice(self, stores: int, recalls: int) -> None:
        for place, (count, queue) in enumerate(((stores, self.storing), (recalls, self.recalling))):
            while self.told[place] < count:
                queue.popleft()()
                self.told[place] += 1

    def wait(self) -> None:
        self.stored, self.recalled = self.told[0] + len(self.storing), self.told[1] + len(self.recalling)


class LateEvent:
    """A pass is known to be done after some looks."""

    def __init__(self, rank: int):
        self.chance, self.until, self.done = random.Random(f"event {rank}"), UNTIL[rank], False

    def record(self, stream: object) -> None:
        self.done = False

    def query(self) -> bool:
        self.done = self.done or not self.chance.randrange(self.until)
        return self.done

    def synchronize(self) -> None:
        self.done = True


def install_faults() -> None:
    init, begin = Pager.__init__, Prefill._begin_pass

    def late(self: Pager, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        rank = self.ranks.rank
        assert isinstance(self.transfer, HostTransfer)
        self.transfer, self.asynchronous = LateTransfer(self.transfer, rank), True
        self.compute, self.new_event = lambda: None, lambda: LateEvent(rank)

    def doomed(self: Prefill, batch: Any, new_pages: Any) -> Any:
        oom = self.pager.ranks.rank == 1 and [key for key in batch.keys if key.startswith("oom")]
        if oom and oom[0].startswith("oomfirst"):
            raise torch.OutOfMemoryError("injected: no memory on rank 1")
        step = begin(self, batch, new_pages)
        if oom:
            raise torch.OutOfMemoryError("injected: no memory on rank 1 after all pages had their places")
        return step

    Pager.__init__, Prefill._begin_pass = late, doomed  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__"):
    install_faults()
if __name__ == "__main__":
    launch_server.main()
