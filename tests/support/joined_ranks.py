"""Ranks that meet through gloo, each a process: ``python -m tests.support.joined_ranks RANK SIZE FOLDER``."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sglang_lsa.engine.failures import FailedOnAll, begin_together, require_together
from sglang_lsa.memory.progress import Done
from sglang_lsa.memory.ranks import JoinedRanks, RanksDisagree
from sglang_lsa.memory.scores import Reduction

PATIENCE = 3
"""Seconds that a rank waits for the others."""


def join(rank: int, size: int, folder: pathlib.Path) -> JoinedRanks:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    host, failures = (dist.new_group(timeout=timedelta(seconds=seconds)) for seconds in (PATIENCE + 20, PATIENCE))
    return JoinedRanks(host, failures)


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except RanksDisagree as error:
        return str(error)
    return "no error"


def begin(fails: bool) -> str:
    if fails:
        raise MemoryError("all of it is gone")
    return "began"


def meet(ranks: JoinedRanks) -> dict[str, Any]:
    """What every rank sees, in an order that all of them keep."""
    rank, seen = ranks.rank, {}
    seen["every"] = ranks.every(f"rank {rank}", "introduce themselves")
    own = torch.tensor([1.0, float(rank), -1.0 - rank])
    seen["max"] = ranks.scores.reduce(own.clone(), Reduction.MAX).tolist()
    seen["sum"] = ranks.scores.reduce(own.clone(), Reduction.SUM).tolist()
    seen["done"] = ranks.progress.agreed(Done(7 + rank, 3, 9 - rank))
    ranks.progress.restart(Done(100 * rank, 0, 0))
    seen["done after restart"] = ranks.progress.agreed(Done(100 * rank + 5 + rank, 1, 1))
    seen["began"] = begin_together(ranks, lambda: begin(False))
    try:
        begin_together(ranks, lambda: begin(rank == 1))
        seen["one failed"] = "no"
    except FailedOnAll as error:
        seen["one failed"] = str(error)
        require_together(ranks, error, 0)  # which is known
    require_together(ranks, ValueError("everywhere"), 3)
    seen["elsewhere"] = refused(lambda: require_together(ranks, ValueError(), rank))
    ranks.compare(5, lambda: "never asked")
    seen["records"] = refused(lambda: ranks.compare(rank, lambda: f"records of {rank}"))
    seen["alone"] = refused(lambda: ranks.failed_together("lost its way")) if rank == 1 else ""
    return seen


def main(rank: int, size: int, folder: pathlib.Path) -> None:
    logging.basicConfig(level=logging.INFO)
    seen = meet(join(rank, size, folder))
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    while not all((folder / f"{other}.json").exists() for other in range(size)):
        time.sleep(0.05)
    sys.stdout.flush()
    os._exit(0)  # gloo aborts where another process has ended first


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
