"""What a server tells of single requests: collected in the scheduler, formatted in the HTTP process that was asked.

A request of a million tokens has read some 70,000 positions. Writing them out takes tens of milliseconds, in which the
scheduler would serve nobody, so that it hands out the bytes of its arrays, and only of the request that is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_lsa.config import GivenSet
from sglang_lsa.engine.request import Request, Window
from sglang_lsa.engine.summary import describe
from sglang_lsa.serve.read_together import memberships

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime

MOST_RUNNING = 256
"""Running requests in an overview, the oldest ones; the others are only counted."""
LONGEST_NAME = 200
"""Characters of a request's id in an overview; it may be of any length."""


def overview(runtime: LSARuntime) -> dict[str, Any]:
    """Numbers of the last finished requests and of the running ones, no sets; bounded whatever the server has to do."""
    running = list(runtime.requests.values())
    return {
        "finished": [_shortened(request.summary) for request in runtime.finished],
        "running": [_shortened(summary) for summary in _running(runtime, running[:MOST_RUNNING])],
        "more_running": max(0, len(running) - MOST_RUNNING),
    }


def collect(runtime: LSARuntime, rid: str) -> dict[str, Any]:
    """All that is known of the requests named ``rid``, for :func:`formatted`: arrays are bytes of int32."""
    gone = [request for request in runtime.finished if request.summary["rid"] == rid]
    here = [request for request in runtime.requests.values() if request.rid == rid]
    return {
        "finished": [request.summary | {"windows": _packed(request.windows)} for request in gone],
        "running": [
            summary | {"windows": _packed(request.story.windows), "resident": _bytes(request.read_pages())}
            for request, summary in zip(here, _running(runtime, here), strict=True)
        ],
        "more_running": 0,
    }


def formatted(collected: dict[str, Any]) -> dict[str, Any]:
    """Plain JSON values of what :func:`collect` took.

    ``history`` has the resident positions of each window below its tail. ``sets`` can be given to another request with
    the same prompt, see ``RequestOptions.sets``. ``watched`` has the scores of the pages that the request asked about.
    ``resident``, of a running request, are the virtual pages that its decode steps read; ``group`` says with how many
    others it reads some of them, see :class:`sglang_lsa.serve.read_together.Membership`, and is None if with none.
    """
    return {
        name: [_formatted(entry) for entry in value] if isinstance(value, list) else value
        for name, value in collected.items()
    }


def _running(runtime: LSARuntime, requests: list[Request]) -> list[dict[str, Any]]:
    groups = memberships(runtime, requests)
    rules = runtime.lookahead.rules
    return [describe(request, rules) | {"group": groups.get(request.key)} for request in requests]


def _formatted(entry: dict[str, Any]) -> dict[str, Any]:
    entry = dict(entry)
    if "resident" in entry:
        entry["resident"] = _numbers(entry["resident"])
    if (windows := entry.pop("windows", None)) is None:
        return entry
    sets = [GivenSet(w["tokens"], w["tail_start"], tuple(_numbers(w["positions"]))) for w in windows]
    return entry | {
        "history": [list(of.positions) for of in sets],
        "sets": ";".join(str(of) for of in sets if of.tokens),
        "watched": [{"tokens": w["tokens"], **w["watched"]} for w in windows if w["tokens"] and w["watched"]],
    }


def _packed(windows: Iterable[Window]) -> list[dict[str, Any]]:
    return [
        {
            "tokens": window.tokens,
            "tail_start": window.tail_start,
            "positions": _bytes(window.positions),
            "watched": dataclasses.asdict(window.watched) if window.watched else None,
        }
        for window in windows
    ]


def _bytes(ids: np.ndarray) -> bytes:
    return ids.astype(np.int32).tobytes()


def _numbers(ids: bytes) -> list[int]:
    return np.frombuffer(ids, dtype=np.int32).tolist()


def _shortened(summary: dict[str, Any]) -> dict[str, Any]:
    return summary | {"rid": summary["rid"][:LONGEST_NAME]}
