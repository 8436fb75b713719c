"""What the live view shows of one scheduler process: plain values, bounded whatever the server has to do."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_lsa.config import FULL
from sglang_lsa.engine.groups import Group
from sglang_lsa.engine.request import Request
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.serve.metrics import measure
from sglang_lsa.serve.read_together import memberships, running_groups

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime

MOST_REQUESTS = 128
"""Requests in one snapshot, the oldest ones; the others are only counted."""
MOST_COLUMNS = 512
"""Columns of one request's map; a longer request has several pages in each."""
LONGEST_NAME = 64
"""Characters of a request's id that are shown; it may be of any length."""

HOST, CACHED, ARRIVING, RESIDENT, RECALLED, SINK = range(6)
"""Where a page is: only in the host mirror; on the device, not read by this request; on its way to the device; read by
its decode steps; read, and recalled for this window; one of the first pages, which are always read. A column of several
pages shows the greatest of its pages' states."""
NO_PASS = np.iinfo(np.int64).max
SHARES = 10
"""Steps in which a column of several pages says what share of them is read."""


def snapshot(runtime: LSARuntime) -> dict[str, Any]:
    """Pools, counters and running requests; see :func:`encode` for the maps. Without the radix tree."""
    requests = list(runtime.requests.values())
    shown = requests[:MOST_REQUESTS]
    in_groups = memberships(runtime, shown)
    ledger = runtime.pager.ledger
    return {
        "time": time.time(),
        "policy": runtime.config.policy,
        "budget": runtime.config.budget,
        "window": runtime.config.window,
        "page_tokens": runtime.pager.page,
        "page_bytes": runtime.pager.page_bytes,
        "virtual_pages": ledger.virtual_pages,
        "virtual_allocated": ledger.allocated_pages,
        "values": {name.removeprefix("lsa_"): value for name, value in measure(runtime).items()},
        "requests": [
            describe(runtime, request, states) | {"group": in_groups.get(request.key)}
            for request, states in zip(shown, page_states(runtime, shown), strict=True)
        ],
        "more_requests": len(requests) - len(shown),
        "groups": None if runtime.groups is None else [describe_group(group) for group, _ in running_groups(runtime)],
    }


def describe(runtime: LSARuntime, request: Request, states: np.ndarray) -> dict[str, Any]:
    """One running request.

    Args:
        states: of its pages, see :func:`page_states`.
    """
    context, resident = request.sizes()
    dense = request.resident.tail_start == 0
    return {
        "rid": request.rid if len(request.rid) <= LONGEST_NAME else request.rid[: LONGEST_NAME - 1] + "…",
        "row": request.row,
        "tokens": request.tokens,
        "prompt_tokens": request.prompt_tokens,
        "pages": context,
        "resident": resident,
        "budget": context if dense else runtime.lookahead.rules.set_pages(context, request.asked.budget),
        "window": request.window,
        "steps_left": max(0, min(request.steps_left, runtime.config.window)),
        "policy": FULL if dense else request.asked.policy,
        "phase": "prefill" if request.window < 0 else "decode",
        "prefill": request.story.prefill,
        "coverage": request.story.coverage,
        "stalls": request.story.stalls,
        "shrunk": request.story.shrunk,
        "recalled": int((states == RECALLED).sum()),
        "column": (column := pages_per_column(len(states))),
        "map": encode(states, column),
    }


def describe_group(group: Group) -> dict[str, Any]:
    """Requests that read pages together; ``map`` has a character for each ``column`` pages of what they have in common,
    up to the last page that is read together: ``0`` to ``:``, the share of them that is, in tenths, rounded up."""
    extent = int(group.positions[-1]) + 1
    column = pages_per_column(extent)
    counts = np.bincount(group.positions // column, minlength=pages_spanned(extent, column))
    shares = np.ceil(counts / column * SHARES).astype(np.uint8)
    return {
        "members": len(group.members),
        "pages": len(group.positions),
        "chosen": group.chosen,
        "column": column,
        "map": (shares + ord("0")).tobytes().decode("ascii"),
    }


def page_states(runtime: LSARuntime, requests: Sequence[Request]) -> list[np.ndarray]:
    """State of every page of each request, uint8 ``[pages]`` of :data:`HOST` to :data:`SINK`.

    All requests are looked up at once: numpy's price is by the call, and the scheduler waits meanwhile.
    """
    if not requests:
        return []
    ledger = runtime.pager.ledger
    sizes = [len(request.pages) for request in requests]
    starts = np.concatenate(([0], np.cumsum(sizes)))
    pages = np.concatenate([request.pages for request in requests])
    read = np.zeros(len(pages), dtype=bool)
    for request, start, end in zip(requests, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        read[start + request.resident.positions] = True
        read[start + request.resident.tail_start : end] = True
    here = ledger.on_device(pages)
    # A prompt that is being streamed has no set yet and reads pages that are not here: those are on the host.
    read &= here
    # Before its first set, nothing was recalled for a window.
    since = np.repeat([request.resident.set_asked or NO_PASS for request in requests], sizes)
    states = np.full(len(pages), HOST, dtype=np.uint8)
    states[here] = CACHED
    states[read] = RESIDENT
    states[read & (ledger.recalled(pages) >= since)] = RECALLED
    states[here & ledger.arriving(pages)] = ARRIVING
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        sink = states[start : min(end, start + runtime.config.sink_pages)]
        sink[sink >= RESIDENT] = SINK
    return np.split(states, starts[1:-1])


def pages_per_column(pages: int) -> int:
    """A power of two, so that a column of a growing request is split between two of the next size at most."""
    return 1 << max(0, math.ceil(math.log2(max(1, pages) / MOST_COLUMNS)))


def encode(states: np.ndarray, column: int) -> str:
    """The map of one request: a character for each ``column`` pages, at most :data:`MOST_COLUMNS`.

    ``0`` to ``2`` are :data:`HOST` to :data:`ARRIVING`. Ten characters follow for each of :data:`RESIDENT` (``3`` to
    ``<``), :data:`RECALLED` and :data:`SINK`: the column's share of pages that are read, in tenths, rounded up.

    Not run-length encoded: sets are scattered, so that it would save little, and it is a loop in Python.
    """
    if column == 1:
        shares = np.uint8(SHARES)
        top = states
    else:
        padding = -len(states) % column
        columns = np.pad(states, (0, padding)).reshape(-1, column)
        counts = np.full(len(columns), column)
        counts[-1:] -= padding
        top = columns.max(axis=1)
        shares = np.ceil((columns >= RESIDENT).sum(axis=1) / counts * SHARES).astype(np.uint8)
    # Columns whose greatest state is not read have no share.
    codes = np.where(top < RESIDENT, top, RESIDENT + (top - np.minimum(top, RESIDENT)) * SHARES + shares - 1)
    return (codes.astype(np.uint8) + ord("0")).tobytes().decode("ascii")
