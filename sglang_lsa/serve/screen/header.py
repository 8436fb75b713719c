"""``X-LSA: budget=0.3,policy=quest``: the options of a request where its protocol has no place for them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from sglang_lsa.config import RequestOptions

HEADER = "x-lsa"
LONGEST = 8192
"""Characters; about what servers take as a header."""
WRITTEN = ("sets", "watch", "policy", "prefill")
"""Options that are text, whatever they look like."""
EXAMPLE = "X-LSA: budget=0.3,policy=quest"

asked: ContextVar[dict[str, Any] | None] = ContextVar("options asked for by the header", default=None)
"""What the header of the request that is being answered asks for; None without one."""


def parse(lines: Iterable[bytes]) -> dict[str, Any] | None:
    """The options in a request's headers of that name, as ``custom_params.lsa`` would hold them; None without any.

    A part without ``=`` belongs to the value before it, so that lists need no quotes: ``watch=0,3,5``.

    Raises:
        ValueError: not of this form, an unknown option, or one twice. Values are checked with the request's others.
    """
    written = ",".join(line.decode("latin-1") for line in lines)
    if not written.strip():
        return None
    if len(written) > LONGEST:
        raise ValueError(f"the header X-LSA has {len(written)} characters: use at most {LONGEST}")
    known = [field.name for field in dataclasses.fields(RequestOptions)]
    texts: dict[str, str] = {}
    name = ""
    for part in written.split(","):
        key, equals, value = part.partition("=")
        if not equals and name:
            texts[name] += "," + part.strip()
            continue
        name = key.strip()
        if name not in known or not equals:
            raise ValueError(f"the header X-LSA has {name!a:.80}: write {EXAMPLE}, with {', '.join(known)}")
        if name in texts:
            raise ValueError(f"the header X-LSA has {name} twice: give it once")
        texts[name] = value.strip()
    return {name: text if name in WRITTEN else _value(text) for name, text in texts.items()}


def _value(text: str) -> Any:
    """A number, true or false as in JSON; anything else as it is, for the option's own check to refuse."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def merged(parameters: dict[str, Any], options: dict[str, Any] | None) -> dict[str, Any]:
    """Sampling parameters with the header's options among ``custom_params.lsa``.

    Raises:
        ValueError: the body and the header both give an option, with different values.
    """
    if not options:
        return parameters
    custom = parameters.get("custom_params")
    if custom is None:
        custom = {}
    inside = custom.get("lsa") if isinstance(custom, dict) else None
    if not isinstance(custom, dict) or not isinstance(inside, dict | None):
        raise ValueError("the header X-LSA and custom_params are both given, and custom_params.lsa is no object")
    for name, value in options.items():
        if inside and name in inside and inside[name] != value:
            raise ValueError(
                f"{name} is {inside[name]!a:.80} in custom_params.lsa and {value!a:.80} in X-LSA: give one"
            )
    return parameters | {"custom_params": custom | {"lsa": options | (inside or {})}}
