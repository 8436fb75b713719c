"""Which fields of LSAConfig are flags, which are keys only, which are constants; and what became of older flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

FLAG = "flag"
"""What a user decides when a server starts: a flag, and a key of ``--lsa-config`` and ``sgl.Engine(lsa_config=)``."""
KEY = "key"
"""A default that ``POST /lsa/config``, or a request, may change, or a default that few have a reason to: a key of the
same files, but no flag."""
CONSTANT = "constant"
"""Part of the method: no flag and no key. A program that makes an LSAConfig itself can say otherwise, as tests with
pools of a dozen pages do."""


def option(default: Any, help: str, *, metavar: str | None = None, choices: Collection[str] | None = None) -> Any:
    return _field(FLAG, default, help, metavar, choices)


def key(default: Any, help: str) -> Any:
    return _field(KEY, default, help)


def constant(default: Any, help: str) -> Any:
    return _field(CONSTANT, default, help)


def flag_of(name: str) -> str:
    """Of the field ``name``."""
    return "--lsa-" + name.replace("_", "-")


_BY_KEY = (
    "give the key {} in --lsa-config (a JSON file or object), or change it on the running server with POST /lsa/config"
)
_BY_REQUEST = _BY_KEY + ", or in a request's custom_params.lsa"

REMOVED: dict[str, str] = {
    "min_pages": "the least is 8 pages, and the key floor_tokens in --lsa-config if that is more; give that key",
    "first_window": "all windows are whole; ask for dense_steps in a request whose answer copies or collects",
    "dense_steps": _BY_REQUEST.format("dense_steps"),
    "prompt_lookup": _BY_REQUEST.format("prompt_lookup"),
    "prefetch_steps": "pages are sent for 16 steps ahead, or a quarter of a shorter --lsa-window; if they come late, "
    "lower --lsa-budget or raise --lsa-window",
    "sink_pages": "the first page always stays; raise --lsa-budget to keep more",
    "recent_pages": "the last 4 pages always stay, or a quarter of a smaller set; raise --lsa-budget to keep more",
    "prompt_pages": "the last 2 pages of a prompt always stay; raise --lsa-budget to keep more",
    "fallback_budget": _BY_KEY.format("fallback_budget"),
    "min_coverage": _BY_KEY.format("min_coverage"),
    "threshold": _BY_KEY.format("threshold"),
    "query_tokens": "the last 32 positions vote; a trained indexer says itself how many do",
    "staging_pages": "a prompt is read through buffers of 256 pages, or of half of a smaller device pool; "
    "size that with --lsa-device-tokens",
}
"""Flags of earlier versions: what to do instead. Those that are keys still are, and only their flags are refused."""


def _field(
    kind: str, default: Any, help: str, metavar: str | None = None, choices: Collection[str] | None = None
) -> Any:
    about = {"kind": kind, "help": help, "metavar": metavar, "choices": choices}
    return dataclasses.field(default=default, metadata=about)
