"""Request ids: whose a running request is, and which ones an abort means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SAMPLE = re.compile(r"_[0-9a-f]{32}")
"""What SGLang appends to a request's id for each of its samples (``n`` > 1)."""


def means(asked: str, rid: str) -> bool:
    """Whether aborting ``asked`` is to end ``rid``: it is the same, or one of its samples."""
    return rid.startswith(asked) and (rid == asked or SAMPLE.fullmatch(rid, len(asked)) is not None)


@contextmanager
def only(asked: str, requests: Iterable[Any]) -> Iterator[None]:
    """Inside, no other request's ``rid`` begins with ``asked``; SGLang ends all that do.

    Names of the others are put back at the end. Nothing else may look at them meanwhile.
    """
    others = {
        id(request): (request, request.rid)
        for request in requests
        if request.rid.startswith(asked) and not means(asked, request.rid)
    }
    elsewhere = "a" if not asked.startswith("a") else "b"
    try:
        for request, rid in others.values():
            request.rid = elsewhere + rid
        yield
    finally:
        for request, rid in others.values():
            request.rid = rid


def life_of(state: Any) -> object:
    """What tells a request from a later one of the same name: its samples share it, where SGLang gives them one."""
    return getattr(state, "lifecycle_id", state)


def owned(rids: dict[str, object], states: dict[str, Any], samples: dict[str, set[str]]) -> list[str]:
    """Those of ``rids`` that still are of the request that they were given to.

    Args:
        rids: each with the token of the life that it began.
        states: SGLang's, by rid.
        samples: rids of the samples of each rid that has some.
    """

    def lives(rid: str, life: object) -> bool:
        state = states.get(rid)
        return state is not None and life_of(state) is life

    return [
        rid
        for rid, life in rids.items()
        if lives(rid, life) or any(lives(child, life) for child in samples.get(rid, ()))
    ]
