"""A forward pass as an object: everything that attention, recorder and graph sizing need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sglang_lsa.engine.arrival import Entry
from sglang_lsa.engine.grouping import Grouping
from sglang_lsa.engine.groups import FEWEST_MEMBERS
from sglang_lsa.engine.reading import Reading
from sglang_lsa.engine.request import Request
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.memory.staging import StagedPages

EXTEND = "extend"
"""Computes tokens of prompts."""
DECODE = "decode"
"""Computes one token of each request."""


def _nobody(index: int) -> Entry:
    raise LookupError(f"no request {index} enters with this batch")


class Batch(NamedTuple):
    """What the scheduler is about to compute; ``patches/batch.py`` makes it.

    Attributes:
        kind: as in :class:`Step`.
        keys: names of the requests, as admission gave them.
        lengths, prefixes: tokens of each request after and before this pass.
        middle: place of the request whose prompt has more chunks; None without one.
        entry: by its place, a request of which nothing was computed yet.
    """

    kind: str = ""
    keys: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    prefixes: tuple[int, ...] = ()
    middle: int | None = None
    entry: Callable[[int], Entry] = _nobody


class Step(NamedTuple):
    """Made once, before a forward pass is queued, and made anew only after a first look at resident prefixes.

    A named tuple, since making one is a tenth of a quiet decode step otherwise.

    Outside a pass, and while CUDA graphs are captured, there is one without requests: then every row is padding.

    Attributes:
        kind: :data:`EXTEND`, :data:`DECODE`, or "" for a pass without requests.
        requests: in the order of the batch.
        lengths: tokens of each request after this pass.
        prefixes: tokens of each request before this pass.
        middle: place of the request whose prompt has more chunks; None without one.
        rows: int64 ``[requests]``, their rows in SGLang's ``req_to_token`` and in the static tables.
        fits_graph: whether the CUDA graphs' buffers can hold what this pass reads.
        readings: what each request reads before its own tokens; None when that is all, in place.
        staged: pages that this pass reads from the host.
        looks: requests, by their place, whose resident prefix is chosen after a first look: the pass is run twice.
        grouping: which of them read pages together, if any do.
        captures_groups: the CUDA graph that is being captured is for steps that have a grouping.
    """

    kind: str = ""
    requests: tuple[Request, ...] = ()
    lengths: tuple[int, ...] = ()
    prefixes: tuple[int, ...] = ()
    middle: int | None = None
    rows: np.ndarray = np.zeros(0, dtype=np.int64)
    fits_graph: bool = True
    readings: tuple[Reading, ...] | None = None
    staged: StagedPages | None = None
    looks: tuple[int, ...] = ()
    grouping: Grouping | None = None
    captures_groups: bool = False

    @classmethod
    def of(cls, batch: Batch, requests: Sequence[Request], **found: Any) -> Step:
        """The pass that computes ``batch``, whose requests these are."""
        rows = np.array([request.row for request in requests], dtype=np.int64)
        return cls(batch.kind, tuple(requests), batch.lengths, batch.prefixes, batch.middle, rows, **found)

    @property
    def reads_together(self) -> bool:
        """Whether attention has a call for groups in this pass: a step without one has no part in what they cost."""
        return self.grouping is not None or self.captures_groups

    def own_table(self, table: ResidentTable) -> ResidentTable:
        """What each request reads by itself: all that ``table`` says, or what its group leaves of that."""
        return table if self.grouping is None else self.grouping.own

    def fits(self, table: ResidentTable, graph_tokens: int) -> bool:
        """Whether buffers of so many slots hold what a decode step reads; padding reads one slot a row."""
        read = sum(self.lengths) - int(self.own_table(table).shortening[self.rows].sum())
        return read + table.rows <= graph_tokens

    def decode_indptr(self, table: ResidentTable, seq_lens: torch.Tensor) -> torch.Tensor:
        """Where each request's own slots start in this pass, int32 ``[batch + 1]`` on the host.

        Args:
            seq_lens: ``[batch]`` tokens of each request, on the host; requests beyond those of this pass are padding.
        """
        lengths = seq_lens.numpy().astype(np.int64)
        real = len(self.rows)
        lengths[:real] = self.own_table(table).lengths(self.rows, lengths[:real])
        indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=indptr[1:])
        return torch.from_numpy(indptr)


IDLE = Step()
"""No pass is being queued."""


def captured(batch: int, groups: bool) -> tuple[Step, ...]:
    """The passes that CUDA graphs of so many requests are captured as, in this order.

    With groups there are two graphs of each size from two requests on, since a graph has a call for groups or has not.
    The second costs what SGLang pays for a graph of that size: two passes and the capture at start, and the device
    memory in which the driver keeps its nodes. What is computed in it lies in the pool of memory that all graphs share,
    and its attention reads the plan and the buffers of the first; the one with more calls comes first, so that the
    other fits into what it leaves, as larger sizes come before smaller ones.

    Args:
        groups: whether they are formed.
    """
    return (Step(captures_groups=True), IDLE) if groups and batch >= FEWEST_MEMBERS else (IDLE,)
