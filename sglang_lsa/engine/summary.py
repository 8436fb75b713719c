"""A request in a few numbers, running or gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_lsa.config import AUTO, FULL
from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.request import Request, Window


@dataclass(frozen=True)
class Finished:
    """A request whose KV is released. A retracted request is one for every time it was admitted.

    Attributes:
        summary: see :func:`describe`, and ``number``, which tells in what order requests finished.
        windows: the last sets that it read, as they are; formatted when somebody asks.
    """

    summary: dict[str, Any]
    windows: tuple[Window, ...]


def finished(request: Request, number: int, rules: Rules) -> Finished:
    """Remember a request that is gone: a few numbers, and references to what it read."""
    return Finished(describe(request, rules) | {"number": number}, tuple(request.story.windows))


def describe(request: Request, rules: Rules) -> dict[str, Any]:
    """One request, running or just finished, in a few numbers."""
    context, resident = request.sizes()
    dense = request.resident.tail_start == 0
    return {
        "rid": request.rid,
        "context_tokens": request.tokens,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.story.cached_tokens,
        "context_pages": context,
        "resident_pages": resident,
        "budget_pages": context if dense else rules.set_pages(context, request.asked.budget),
        "window": request.window,
        "policy": FULL if dense else request.asked.policy,
        "budget": request.asked.budget if request.asked.target is None else AUTO,
        "stalls": request.story.stalls,
        "shrunk": request.story.shrunk,
        "coverage": request.story.coverage,
        "expected_coverage": request.story.expected,
        "widened": request.story.widened,
        "collapsed": request.story.collapsed,
        "failures": request.story.failures,
        "prefill": request.story.prefill,
    }
