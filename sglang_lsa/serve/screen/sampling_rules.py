"""Rules for single keys of ``sampling_params``."""

from __future__ import annotations

import math
import re
from typing import Any

from sglang_lsa.serve.screen.rules import LARGEST_FLOAT32, Refused, Server, number, text, texts

FINITE = number()

GREEDY = 1e-6
"""Below this temperature SGLang takes the best token, whatever the numbers are."""
MOST_SCALED = 1e38
"""What a logit may become. Beyond, it is an infinity in float32, and no probability: a GPU ends the server over it."""
MOST_LOGIT = 1e3
"""No model's logit is as large."""
MOST_SAMPLES = 16_384
"""Answers to one prompt. SGLang has no bound, and builds them all before the first is sent."""


def ids_in_vocabulary(name: str, value: Any, request: Any, server: Server) -> Any:
    """Token ids; those that the model cannot generate are left out, since nothing will ever match them."""
    if value is None:
        return value
    try:
        ids = {int(item) for item in value if item is not None}
    except (TypeError, ValueError, OverflowError):
        raise Refused(name, value, "use a list of token ids") from None
    return sorted(item for item in ids if 0 <= item < server.vocabulary)


def logit_bias(name: str, value: Any, request: Any, server: Server) -> Any:
    """Token id to bias; a bias of -infinity bans a token. Those that a low temperature would make infinite are cut."""
    if value is None:
        return value
    if not isinstance(value, dict):
        raise Refused(name, value, "use an object of token ids and numbers")
    for key, bias in value.items():
        try:
            known = 0 <= int(key) < server.vocabulary
        except (TypeError, ValueError):
            known = False
        if not known:
            raise Refused(f"{name} of token", key, f"use ids from 0 to {server.vocabulary - 1}")
        if not isinstance(bias, int | float) or not (bias == -math.inf or abs(bias) <= LARGEST_FLOAT32):
            raise Refused(f"{name}[{key}]", bias, "use a number that float32 can hold")
    most = MOST_SCALED * divisor(request)
    return {
        key: bias if abs(bias) <= most or bias == -math.inf else math.copysign(most, bias)
        for key, bias in value.items()
    }


def repetition_penalty(name: str, value: Any, request: Any, server: Server) -> Any:
    """A number by which logits are divided: not so small that they become infinite."""
    value = FINITE(name, value, request, server)
    least = MOST_LOGIT / MOST_SCALED / divisor(request)
    if value is not None and 0 < value < least:
        raise Refused(name, value, f"use a number from {least:.0e} on, or a higher temperature")
    return value


def divisor(request: Any) -> float:
    """By what a request's temperature divides logits, if that makes them larger; else 1."""
    parameters = request.sampling_params
    temperature = parameters.get("temperature") if isinstance(parameters, dict) else None
    return float(temperature) if isinstance(temperature, int | float) and GREEDY <= temperature < 1 else 1.0


def patterns(name: str, value: Any, request: Any, server: Server) -> Any:
    """Regular expressions that compile."""
    value = texts(name, value, request, server)
    for pattern in [value] if isinstance(value, str) else value or ():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise Refused(name, pattern, f"use a regular expression that compiles ({error})") from None
    return value


def grammar(name: str, value: Any, request: Any, server: Server) -> Any:
    """A text that the grammar's compiler reads; what is empty constrains nothing."""
    return text(name, value, request, server) if value else None


def length(name: str, value: Any, request: Any, server: Server) -> Any:
    """A whole number of tokens, or null; SGLang cuts the answer there."""
    if value is None:
        return value
    if not isinstance(value, int) and not (isinstance(value, float) and value.is_integer()):
        raise Refused(name, value, "use a whole number of tokens")
    return int(value)


def samples(name: str, value: Any, request: Any, server: Server) -> Any:
    """How many answers; SGLang makes that many requests at once."""
    if value is None:
        return 1
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole or value > MOST_SAMPLES:
        raise Refused(name, value, f"use a whole number up to {MOST_SAMPLES}")
    return int(value)


def custom_params(name: str, value: Any, request: Any, server: Server) -> Any:
    """Anything; our list of watched pages as text, which every form of SGLang's messages can carry."""
    asked = value.get("lsa") if isinstance(value, dict) else None
    pages = asked.get("watch") if isinstance(asked, dict) else None
    if isinstance(asked, dict) and isinstance(pages, list) and all(type(page) is int for page in pages):
        return value | {"lsa": asked | {"watch": ",".join(map(str, pages))}}
    return value
