"""Several ranks in one process: each is a simulation in a thread of its own, and they meet where real ones meet.

    python tests/support/simulated_ranks.py --seeds 500 [--first 0]

All are told the same by the world. Each has heads of its own, which score as they like, and a GPU of its own, whose
copies and passes end when they like. After every step of the scheduler the ranks must have the same records.
"""

from __future__ import annotations

import argparse
import collections
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from simulation import Simulation

from sglang_lsa.engine.integrity import compare
from sglang_lsa.memory.ranks import JoinedRanks, Ranks, RanksDisagree, _AllHeads, _SlowestCounts

PATIENCE = 60
"""Seconds that a rank waits for another: one that never comes is a deadlock."""


class Meeting:
    """Where ranks come together. One that comes for something else than the others is an error on all of them."""

    def __init__(self, size: int):
        self.brought: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)
        self.counts: collections.Counter[str] = collections.Counter()

    def meet(self, rank: int, what: str, value: Any) -> list[Any]:
        self.brought[rank] = what, value
        self.barrier.wait(PATIENCE)
        seen = list(self.brought)
        self.barrier.wait(PATIENCE)
        if len({why for why, _ in seen}) > 1:
            raise RanksDisagree(f"ranks come together for different things: {[why for why, _ in seen]}")
        self.counts[what] += rank == 0
        return [value for _, value in seen]


class MetRanks(JoinedRanks):
    """A rank in a thread; it has no process group, and all else as :class:`JoinedRanks`."""

    def __init__(self, meeting: Meeting, size: int, rank: int):
        Ranks.__init__(self, size, rank, size)
        self.meeting = meeting
        self.progress, self.scores = _SlowestCounts(self), _AllHeads(self)

    def reduced(self, values: torch.Tensor, how: Any, what: str) -> torch.Tensor:
        seen = torch.stack(self.meeting.meet(self.rank, f"{what} {tuple(values.shape)}", values.clone()))
        if how == dist.ReduceOp.SUM:
            return values.copy_(seen.sum(0))
        return values.copy_(seen.amin(0) if how == dist.ReduceOp.MIN else seen.amax(0))

    def compare(self, digest: int, describe: Callable[[], str]) -> None:
        self.checks += 1
        if len(set(self.meeting.meet(self.rank, "compare records", digest))) > 1:
            told = self.meeting.meet(self.rank, "say what their records are", describe())
            raise RanksDisagree("ranks have different records\n" + "\n".join(told))

    def _every(self, value: Any, what: str, group: Any) -> list[Any]:
        return self.meeting.meet(self.rank, what, value)


class RankSimulation(Simulation):
    """One of the ranks."""

    def step(self) -> bool:
        ran = super().step()
        compare(self.pager, self.runtime.requests)
        return ran


class LateCopies(RankSimulation):
    """A rank on which no copy ends before somebody waits for it, and passes end late."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.gpu.progress = self._passes_only  # type: ignore[method-assign]

    def _passes_only(self, items: int) -> None:
        for _ in range(items // 3):
            if self.gpu.computed < len(self.gpu.compute):
                self.gpu._compute()


def failures_of(
    seed: int,
    kinds: tuple[type[Simulation], ...] = (RankSimulation, RankSimulation),
    steps: int = 150,
    auto: bool = False,
    groups: bool = False,
) -> tuple[list[str], collections.Counter[str]]:
    """Run one seed on as many ranks as ``kinds``: what went wrong on each, and what happened how often."""
    meeting = Meeting(len(kinds))
    failures: list[str] = []
    simulations: list[Simulation] = []

    def run(rank: int, kind: type[Simulation]) -> None:
        try:
            simulation = kind(seed, ranks=MetRanks(meeting, len(kinds), rank), auto=auto, groups=groups)
            simulations.append(simulation)
            simulation.run(steps)
            simulation.counts["exchanged"] = simulation.runtime.lookahead.counts.exchanged
        except threading.BrokenBarrierError:
            failures.append(f"rank {rank} waited for another that did not come: {traceback.format_exc(limit=-4)}")
        except Exception:
            meeting.barrier.abort()
            failures.insert(0, f"seed {seed}, rank {rank}: {traceback.format_exc(limit=-6)}")

    threads = [threading.Thread(target=run, args=(rank, kind)) for rank, kind in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = collections.Counter(simulations[0].counts if simulations else {})
    if not failures and any(simulation.counts != counts for simulation in simulations):
        failures.append(f"seed {seed}: ranks counted differently: {[simulation.counts for simulation in simulations]}")
    for what, count in meeting.counts.items():
        counts[what.partition(" (")[0]] += count
    return failures, counts


def main() -> int:
    """Exit status: 0 when every seed ended well, 1 when one did not."""
    parser = argparse.ArgumentParser(description="Run several ranks for many seeds.")
    parser.add_argument("--seeds", type=int, default=100, help="how many (100)")
    parser.add_argument("--first", type=int, default=0, help="the first one (0)")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    total, failed = collections.Counter[str](), 0
    for seed in range(args.first, args.first + args.seeds):
        kinds = (RankSimulation, LateCopies) if seed % 2 else (RankSimulation, RankSimulation)
        failures, counts = failures_of(seed, kinds)
        total += counts
        failed += bool(failures)
        print(*failures[:1], sep="", end="\n" if failures else "")
    print(f"{args.seeds} seeds, {failed} failed: " + ", ".join(f"{what} {n}" for what, n in sorted(total.items())))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
