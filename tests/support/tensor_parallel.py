"""LSA's server of two ranks; things go wrong on rank 1 alone: ``python -m tensor_parallel [flags]``.

On a CPU both ranks copy as a GPU does: what is queued ends some steps later, at times that each rank draws for itself,
and on rank 1 late. On GPUs the copies of rank 1 take longer. A prompt whose id begins with ``oom`` finds no memory on
rank 1.
"""

from __future__ import annotations

import os
import pathlib
import random
import shlex
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from families import SMALL, TINY, Size, write_model
from gpu_servers import AS_LSA_ATTENDS

from sglang_lsa import launch_server
from sglang_lsa.engine.prefill import Prefill
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.transfer import Finished, HostTransfer, StreamTransfer

SUPPORT = pathlib.Path(__file__).resolve().parent
UNTIL = {0: 2, 1: 12}
"""By rank: a copy is known to be done after so many looks at most."""
CYCLES = 20_000_000
"""Of a GPU's clock, by which a copy of rank 1 begins later: about 10 ms."""
FLAGS = ["--tp-size", "2", "--skip-tokenizer-init", "--skip-server-warmup", "--chunked-prefill-size", "512"]


@dataclass(frozen=True)
class Place:
    """Where two ranks run.

    Attributes:
        flags: of any server.
        sizes: of models, by family; the heads of the second are those of Qwen2.5-0.5B.
        exact: the same tokens have the same probabilities, whatever company they are computed in.
        stock: flags of stock SGLang beside them.
        seconds: that a server takes to start, at most.
    """

    flags: tuple[str, ...]
    environment: dict[str, str]
    sizes: dict[str, Size]
    dtype: torch.dtype
    exact: bool
    stock: tuple[str, ...] = ()
    seconds: float = 300

    def model(self, folder: pathlib.Path, family: str) -> str:
        """A random one, written into this folder; its path."""
        return write_model(folder, family, self.sizes[family], self.dtype)

    def variables(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
        return {**self.environment, "PYTHONPATH": path}


CPU = Place(
    flags=(*FLAGS, "--disable-custom-all-reduce", "--dtype", "float32"),
    # SGLang starts PyNccl if it finds its library, and gives each rank a NUMA node of its own. Where the vocabulary is
    # split, its first pass compiles a mask of three comparisons: 20 seconds a rank at every start.
    environment={
        "TORCHDYNAMO_DISABLE": "1",
        "SGLANG_NCCL_SO_PATH": "/nonexistent",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        "OMP_NUM_THREADS": "1",
    },
    sizes={"llama": TINY, "qwen2.5": Size(layers=2, q_heads=14, kv_heads=2, head_dim=16, sharpness=2.0)},
    dtype=torch.float32,
    exact=True,
)
GPUS = Place(
    flags=(
        *FLAGS,
        *("--dtype", "bfloat16", "--max-running-requests", "16", "--mem-fraction-static", "0.3"),
        "--enforce-disable-flashinfer-allreduce-fusion",  # multicast over NVLink, which not every machine has
        *shlex.split(os.environ.get("SGLANG_LSA_TEST_SERVER_ARGS", "")),
    ),
    environment={},
    sizes={
        "llama": SMALL,
        "qwen2.5": Size(layers=4, q_heads=14, kv_heads=2, head_dim=64, sharpness=1.2),
        "qwen3-moe": SMALL,
    },
    dtype=torch.bfloat16,
    exact=False,
    stock=(*AS_LSA_ATTENDS, "--page-size", "64", "--cuda-graph-backend-prefill", "disabled"),
    seconds=600,
)


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
    ) -> int:
        super().recall(physical, virtual, lambda: None, layer_by_layer)
        self.recalling.append(finished)
        return self.told[1] + len(self.recalling)

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


def slow_down(transfer: StreamTransfer) -> None:
    """Let every copy begin later (GPU)."""
    copy = transfer._copy

    def later(stream: torch.cuda.Stream, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
        return copy(stream, *arguments, **options)

    transfer._copy = later  # type: ignore[method-assign]


def install_faults() -> None:
    init, begin = Pager.__init__, Prefill._begin_pass

    def late(self: Pager, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        rank = self.ranks.rank
        if isinstance(self.transfer, StreamTransfer):
            if rank == 1:
                slow_down(self.transfer)
            return
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
