"""Changes to the configuration of a running server: what may change, what is refused, and from where it may be asked.

Pure; the HTTP route and the way to the scheduler are in ``patches/``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from sglang_lsa.config import LSAConfig, coerce, looks_at_index, offered
from sglang_lsa.config.kinds import FLAG, KEY, REMOVED, flag_of

Value = int | float | str | None

OF_A_REQUEST = ("policy", "budget", "prefill", "dense_steps", "prompt_lookup", "widen", "target_coverage", "max_budget")
"""A request that leaves these open takes them from the server when it arrives, and keeps them: by them it is refused or
admitted, so changing them later would break what admission promised."""
OF_A_SET = ("threshold", "fallback_budget", "min_coverage")
"""Read whenever a set is chosen, so running requests follow with their next window. None of them makes a set larger
than the device pool can take at that moment: a set that was widened is cut down again under pressure."""
OF_A_PASS = ("prefill_tokens_per_step", "prefill_burst_tokens")
"""Read when the next batch is chosen."""
CHANGEABLE = (*OF_A_REQUEST, *OF_A_SET, *OF_A_PASS)
"""What may change. Everything else sized a buffer, or is part of a promise or a window that running requests are in."""

IN_FORCE = ("config", "config_changes", "config_changed_at")
"""What is told of the configuration, among all that ``/lsa/status`` tells."""

MAX_BYTES = 64 * 1024
"""Of a body. One that names every field has 200."""
LARGEST = 2**31
"""No number is as large."""


def parse_changes(body: bytes) -> dict[str, Value]:
    """Changes out of a request's body: strict JSON, an object, checked by :func:`check_changes`.

    Raises:
        ValueError: what is wrong, the value seen, what to do.
    """
    try:
        asked = json.loads(body.decode(), parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # the latter from thousands of open brackets
        raise ValueError(f'the body is not JSON ({error}): send an object like {{"budget": 0.2}}') from None
    return check_changes(asked)


def check_changes(asked: Any) -> dict[str, Value]:
    """``asked`` with every value as the type of its field, after what can be checked without the other fields.

    Raises:
        ValueError: see :func:`parse_changes`.
    """
    if not isinstance(asked, dict) or not asked:
        raise ValueError(f"the body is {asked!a:.80}: send an object with one or more of {', '.join(CHANGEABLE)}")
    return {name: _checked(name, value) for name, value in asked.items()}


def changed(config: LSAConfig, values: Mapping[str, Value], index: bool | None = None) -> LSAConfig:
    """``config`` with ``values``, all of them.

    Args:
        values: from :func:`check_changes`.
        index: whether the model has an index of its own; None if only the policy can tell.

    Raises:
        ValueError: the configuration would be impossible, or the policy does not fit the model.
    """
    index = looks_at_index(config.policy) if index is None else index
    names, checked = offered(config.indexer, index), check_changes(dict(values))
    if "policy" in checked and checked["policy"] is None:
        checked["policy"] = names[0]
    after = dataclasses.replace(config, **checked)  # type: ignore[arg-type]
    if after.policy not in names:
        raise ValueError(f"policy is {after.policy!a:.80}: use one that this model has: {', '.join(names)}")
    if index and after.prefill != config.prefill:
        raise ValueError(f"prefill is {after.prefill!a:.80}: prompts of this model are whole: use {config.prefill}")
    return after


def is_foreign(origin: str | None, fetch_site: str | None, host: str | None) -> bool:
    """Whether a browser says that another site's page asks. Programs send neither of the first two headers.

    SGLang answers every origin (CORS ``*``), so without this a page that an administrator happens to read could change
    a server of theirs.

    Args:
        origin, fetch_site, host: headers ``Origin``, ``Sec-Fetch-Site`` and ``Host``; None for those that are missing.
    """
    if fetch_site is not None and fetch_site.strip().lower() not in ("same-origin", "none"):
        return True
    if origin is None:
        return False
    try:
        page = urlsplit(origin.strip())
        return page.scheme not in _PORTS or not host or _place(page) != _place(urlsplit(f"{page.scheme}://{host}"))
    except ValueError:  # a port that is no number
        return True


_FIELDS = {field.name: field for field in dataclasses.fields(LSAConfig)}
_PORTS = {"http": 80, "https": 443}


def _place(url: SplitResult) -> tuple[str | None, int]:
    return url.hostname, url.port or _PORTS[url.scheme]


def _checked(name: str, value: Any) -> Value:
    if name not in _FIELDS:
        raise ValueError(f"unknown key {name!a:.80}: use one or more of {', '.join(CHANGEABLE)}")
    if name not in CHANGEABLE:
        kind = _FIELDS[name].metadata["kind"]
        restart = {FLAG: f"restart it with {flag_of(name)}", KEY: f"restart it with the key {name} in --lsa-config"}
        advice = restart[kind] if kind in restart else REMOVED[name]
        raise ValueError(
            f"{name} cannot change while the server runs: {advice}; what can change is {', '.join(CHANGEABLE)}"
        )
    choices = _FIELDS[name].metadata["choices"]
    if choices and isinstance(value, str) and value not in choices:
        raise ValueError(f"{name} is {value!a:.80}: use one of {', '.join(choices)}")
    if isinstance(value, int | float) and not -LARGEST < value < LARGEST:
        raise ValueError(f"{name} is {value!a:.80}: use a finite number")
    if isinstance(value, list | dict):
        raise ValueError(f"{name} is {value!a:.80}: use a plain value")
    return coerce(name, str(_FIELDS[name].type), value, "POST /lsa/config")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!a:.80} is there twice")
        found[name] = value
    return found
