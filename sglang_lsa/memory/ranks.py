"""Ranks: processes that share a model's heads decide the same; what it takes for that, and what if it fails.

Every rank runs the same scheduler on the same requests, and decides for itself. What it decides by must be the same
everywhere: sizes (at start), what is finished (:class:`Progress`), scores (:class:`Scores`), and whether something
failed. Everything else follows from these.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from sglang_lsa.memory.device_pages import LedgerError
from sglang_lsa.memory.progress import Done, Progress
from sglang_lsa.memory.scores import Reduction, Scores

logger = logging.getLogger(__name__)

TIMEOUT = 120
"""Seconds after which a rank does not wait for the others any longer, and the server ends."""
FAILURE_TIMEOUT = 20
"""The same for a rank on which something failed: the others may have gone on without it."""


class RanksDisagree(LedgerError):
    """Ranks have decided differently, or one has not come where the others wait: no result can be trusted any more."""


class Ranks:
    """One rank, which agrees with itself and exchanges nothing.

    Attributes:
        size: how many there are.
        rank: which of them this is.
        local: how many of them share this host's memory.
        checks: how often the ranks' records were compared.
    """

    def __init__(self, size: int = 1, rank: int = 0, local: int = 1):
        self.size, self.rank, self.local = size, rank, local
        self.progress, self.scores = Progress(), Scores()
        self.checks = 0

    def every(self, value: Any, what: str) -> list[Any]:
        """What each rank brings, by rank; small and rare things.

        Args:
            what: they are exchanged for, as in "agree on sizes".
        """
        return [value]

    def any(self, failed: bool, what: str) -> bool:
        """Whether something failed on any rank. All ranks come here."""
        return failed

    def failed_together(self, what: str) -> None:
        """Something failed on this rank, and on the others too if they are to go on. Only ranks that failed come here.

        Raises:
            RanksDisagree: another rank did not fail, or failed elsewhere.
        """

    def compare(self, digest: int, describe: Callable[[], str]) -> None:
        """See whether all ranks have the same records.

        Args:
            describe: says what they are, for the log.

        Raises:
            RanksDisagree: they have not.
        """


class JoinedRanks(Ranks):
    """Ranks that meet through torch's process groups.

    Args:
        host: gloo's, for numbers of the host; nobody else uses it. Its timeout is :data:`TIMEOUT`.
        failures: another one, whose timeout is :data:`FAILURE_TIMEOUT`.
        device: for scores on the device, on the current stream (GPU); None where they are on the host.
    """

    def __init__(
        self,
        host: dist.ProcessGroup,
        failures: dist.ProcessGroup,
        device: dist.ProcessGroup | None = None,
        local: int | None = None,
    ):
        size = dist.get_world_size(host)
        super().__init__(size, dist.get_rank(host), local or size)
        self.host, self.failures, self.device = host, failures, device
        self.progress, self.scores = _SlowestCounts(self), _AllHeads(self)

    def every(self, value: Any, what: str) -> list[Any]:
        return self._every(value, what, self.host)

    def any(self, failed: bool, what: str) -> bool:
        return bool(self.reduced(torch.tensor([int(failed)]), dist.ReduceOp.MAX, what)[0])

    def failed_together(self, what: str) -> None:
        try:
            seen = self._every(what, f"fail, too: {what}", self.failures)
        except RanksDisagree as error:
            raise RanksDisagree(
                f"LSA: rank {self.rank} of {self.size} failed where others went on ({what}); ranks cannot go on "
                "without each other, so the server ends"
            ) from error
        if len(set(seen)) > 1:
            raise RanksDisagree(f"LSA: ranks failed in different places, so the server ends: {_listed(seen)}")

    def compare(self, digest: int, describe: Callable[[], str]) -> None:
        own = torch.tensor([digest], dtype=torch.int64)
        seen = [torch.empty_like(own) for _ in range(self.size)]
        with self._meeting("compare records"):
            dist.all_gather(seen, own, group=self.host)
        self.checks += 1
        if len({int(other) for other in seen}) > 1:
            told = _listed(self.every(describe(), "say what their records are"))
            raise RanksDisagree(f"LSA: ranks have different records (check {self.checks}); the server ends\n{told}")

    def reduced(self, values: torch.Tensor, how: Any, what: str) -> torch.Tensor:
        """``values`` of all ranks in one, in place; on the host, or queued on the current stream."""
        with self._meeting(what):
            dist.all_reduce(values, op=how, group=self.device if values.is_cuda else self.host)
        return values

    def _every(self, value: Any, what: str, group: dist.ProcessGroup) -> list[Any]:
        seen: list[Any] = [None] * self.size
        with self._meeting(what):
            dist.all_gather_object(seen, value, group=group)
        return seen

    @contextmanager
    def _meeting(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise RanksDisagree(
                f"LSA: rank {self.rank} of {self.size} waited {time.monotonic() - began:.0f} s for the others to "
                f"{what}, and not all came: they have ended, stand still, or decided otherwise ({error})"
            ) from error


class _SlowestCounts(Progress):
    """Finished is what is finished on all ranks."""

    def __init__(self, ranks: JoinedRanks):
        self.ranks = ranks
        self.start = Done(0, 0, 0)

    def agreed(self, seen: Done) -> Done:
        own = torch.tensor([count - start for count, start in zip(seen, self.start, strict=True)])
        least = self.ranks.reduced(own, dist.ReduceOp.MIN, "agree on what is finished").tolist()
        return Done(*(count + start for count, start in zip(least, self.start, strict=True)))

    def restart(self, done: Done) -> None:
        self.start = done


class _AllHeads(Scores):
    """Scores of the heads of all ranks."""

    shared = True

    def __init__(self, ranks: JoinedRanks):
        self.ranks, self.who = ranks, f"rank {ranks.rank} of {ranks.size}"

    def reduce(self, scores: Any, how: Reduction) -> Any:
        op = dist.ReduceOp.SUM if how is Reduction.SUM else dist.ReduceOp.MAX
        return self.ranks.reduced(scores, op, "score pages")


def _listed(values: Sequence[Any]) -> str:
    return "\n".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
