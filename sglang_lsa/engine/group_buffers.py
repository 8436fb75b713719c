"""Device memory with which attention of groups plans on a GPU: its buffers are made of these numbers, and the memory
plan counts them (``attend/together.py``, ``engine/sizing.py``). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sglang_lsa.engine.groups import FEWEST_MEMBERS, MOST_GROUPS

PAST_THE_END = 256
"""FlashInfer reads up to so many indices past the end."""
INT_WORKSPACE = 8 << 20
"""Bytes that a wrapper's plan takes on the device; all CUDA graphs share theirs."""
KV_LENGTHS = 32_768 * 4
"""Bytes that FlashInfer takes for lengths in every wrapper it makes."""


def room_for(batch: int) -> int:
    """Groups that a CUDA graph for so many requests has room for."""
    return min(MOST_GROUPS, batch // FEWEST_MEMBERS)


class GraphBuffers(NamedTuple):
    """Lengths of the static buffers of one CUDA graph that reads in groups, all int32.

    Attributes:
        queries, pages: where those of each group begin.
        indices: pages, for as many groups as there may be; each may read the whole device pool.
        last: tokens in each group's last page.
    """

    queries: int
    pages: int
    indices: int
    last: int

    @classmethod
    def of(cls, batch: int, physical_pages: int) -> GraphBuffers:
        """Of a graph for ``batch`` requests."""
        groups = room_for(batch)
        return cls(groups + 1, groups + 1, groups * physical_pages + PAST_THE_END, groups)

    @property
    def nbytes(self) -> int:
        return 4 * sum(self)


def planning_bytes(rows: int, batches: Sequence[int], physical_pages: int) -> int:
    """Device bytes of all that plans are made with, once every graph is captured.

    The one wrapper for steps without a graph is counted from the start, although the first such step makes it.

    Args:
        rows: requests that run at the same time, and one for padding.
        batches: for how many requests decode CUDA graphs are captured; empty without graphs.
    """
    reading = [batch for batch in batches if batch >= FEWEST_MEMBERS]
    places = 2 * 8 * max([rows, *batches])
    graphs = sum(GraphBuffers.of(batch, physical_pages).nbytes + KV_LENGTHS for batch in reading)
    return places + graphs + INT_WORKSPACE * bool(reading) + INT_WORKSPACE + KV_LENGTHS
