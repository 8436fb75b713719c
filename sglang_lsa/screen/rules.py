"""What one field may be: a rule takes its value and returns the one to pass on, or refuses it."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

INT32, INT64 = 2**31 - 1, 2**63 - 1
LARGEST_FLOAT32 = 3.4028234663852886e38


class Refused(ValueError):
    """A value that must not reach the scheduler; SGLang answers a ValueError with HTTP 400."""

    def __init__(self, name: str, value: Any, use: str):
        super().__init__(f"{name} is {shown(value)}: {use}")


@dataclass(frozen=True)
class Server:
    """What of a server decides what a request may say."""

    vocabulary: int
    hidden_size: int
    dtype: str = "bfloat16"
    disaggregated: bool = False
    encoders: bool = False
    """Whether encoders on other machines embed what is not text (``--language-only``)."""
    lora: bool = False
    delimiters: bool = False
    """Whether prompts of several items are scored (``--enable-mis`` or a delimiter token)."""
    resident: frozenset[type] = field(default_factory=frozenset)
    """Types that only a program around an Engine can pass, never JSON."""


Rule = Callable[[str, Any, Any, Server], Any]
"""``(name, value, request, server) -> value to pass on``; ``request`` is the whole one, for rules of two fields."""


def shown(value: Any) -> str:
    """``value`` for a message: bounded, and printable whatever it is."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def number(least: float = -math.inf, most: float = math.inf, use: str = "use a finite number") -> Rule:
    """A number (JSON's true and false count as 1 and 0, as they do in Python), or null for the default."""

    def rule(name: str, value: Any, request: Any, server: Server) -> Any:
        if value is None:
            return value
        if not isinstance(value, int | float) or not least <= value <= most or abs(value) > sys.float_info.max:
            raise Refused(name, value, use)
        return value if abs(value) <= INT64 else float(value)  # tensors take no larger integer

    return rule


def text(name: str, value: Any, request: Any, server: Server) -> Any:
    """Unicode text, or null. A lone surrogate is none: tokenizers and JSON encoders raise on it."""
    if value is None:
        return value
    if not isinstance(value, str):
        raise Refused(name, value, "use a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(name, value, "use Unicode text (this has half a surrogate pair)") from None
    return value


def name_of_request(name: str, value: Any, request: Any, server: Server) -> Any:
    """A text with at least one character: SGLang ends every request whose name begins with the one to end."""
    if not text(name, value, request, server):
        raise Refused(name, value, "use a text of at least one character, or leave it out")
    return value


def texts(name: str, value: Any, request: Any, server: Server) -> Any:
    """A text or several, or null."""
    if isinstance(value, list | tuple | set):
        return [_not_null(name, item, request, server) for item in value]
    return text(name, value, request, server)


def _not_null(name: str, value: Any, request: Any, server: Server) -> Any:
    if value is None:
        raise Refused(name, value, "use texts only")
    return text(name, value, request, server)


def flag(name: str, value: Any, request: Any, server: Server) -> Any:
    """Anything, by its truth as in Python; the tokenizer wants a real bool."""
    return None if value is None else bool(value)


def dropped(name: str, value: Any, request: Any, server: Server) -> Any:
    """Not passed on: it means nothing here, or is not the client's to say."""
    return None


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
    """Token id to bias; a bias of -infinity bans a token."""
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
    return value


def patterns(name: str, value: Any, request: Any, server: Server) -> Any:
    """Regular expressions that compile."""
    value = texts(name, value, request, server)
    for pattern in [value] if isinstance(value, str) else value or ():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise Refused(name, pattern, f"use a regular expression that compiles ({error})") from None
    return value


def rows_of_floats(name: str, value: Any, request: Any, server: Server) -> Any:
    """``[tokens, hidden_size]`` for a model in bfloat16, the only type that SGLang casts embeddings to."""
    if value is None:
        return value
    if server.dtype != "bfloat16":
        raise Refused(name, "given", f"this server computes in {server.dtype}; start it with --dtype bfloat16")
    if session_of(request) is not None:
        raise Refused(name, "given", "leave out session_params: a session continues token ids")
    if not isinstance(value, list) or not value:
        raise Refused(name, value, f"use rows of {server.hidden_size} numbers")
    for row in value:
        wrong = not isinstance(row, list) or len(row) != server.hidden_size
        if wrong or not all(isinstance(x, int | float) and abs(x) <= LARGEST_FLOAT32 for x in row):
            raise Refused(name, row, f"use rows of {server.hidden_size} numbers that float32 can hold")
    return value


def session_of(request: Any) -> Any:
    parameters = getattr(request, "session_params", None)
    return parameters.get("id") if isinstance(parameters, dict) else None


SESSION: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "rid": (str,),
    "offset": (int,),
    "replace": (bool,),
    "drop_previous_output": (bool,),
}


def session(name: str, value: Any, request: Any, server: Server) -> Any:
    """The five parameters of a session, each of its type or null."""
    for key, item in (value or {}).items():
        if key not in SESSION:
            raise Refused(f"{name} has the key", key, f"use {', '.join(SESSION)}")
        if item is not None and type(item) not in SESSION[key]:
            raise Refused(f"{name}.{key}", item, f"use a value of type {SESSION[key][0].__name__}")
        if isinstance(item, str):
            text(f"{name}.{key}", item, request, server)
        if isinstance(item, int) and abs(item) > INT64:
            raise Refused(f"{name}.{key}", item, "use a smaller number")
    return value


def start_of_logprobs(name: str, value: Any, request: Any, server: Server) -> Any:
    """-1 or a position; without logprobs it means nothing."""
    if not request.return_logprob:
        return -1
    if value < -1:
        raise Refused(name, value, "use -1 for the answer's tokens only, or a position in the prompt")
    return value


def top_logprobs(name: str, value: Any, request: Any, server: Server) -> Any:
    """At most the vocabulary; without logprobs it means nothing, but would count for the batch."""
    if not request.return_logprob:
        return 0
    if value > server.vocabulary:
        raise Refused(name, value, f"the vocabulary has {server.vocabulary} tokens: ask for no more")
    return value


def given_logprobs(name: str, value: Any, request: Any, server: Server) -> Any:
    """SGLang checks these ids itself; without logprobs they mean nothing, but would count for the batch."""
    return value if request.return_logprob else None


def samples(name: str, value: Any, request: Any, server: Server) -> Any:
    """How many answers; SGLang makes that many requests at once."""
    if value is None:
        return 1
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole or value > MOST_SAMPLES:
        raise Refused(name, value, f"use a whole number up to {MOST_SAMPLES}")
    return int(value)


MOST_SAMPLES = 16_384
"""Answers to one prompt. SGLang has no bound, and builds them all before the first is sent."""


def only_where(allowed: Callable[[Server], bool], use: str) -> Rule:
    """Refused unless the server was started for it."""

    def rule(name: str, value: Any, request: Any, server: Server) -> Any:
        if value is not None and not allowed(server):
            raise Refused(name, value, use)
        return value

    return rule


def unless(needed: Callable[[Server], bool]) -> Rule:
    """Passed on only to a server that has a use for it."""

    def rule(name: str, value: Any, request: Any, server: Server) -> Any:
        return value if needed(server) else None

    return rule


def delimiters(name: str, value: Any, request: Any, server: Server) -> Any:
    """Ascending positions in the prompt, on a server that scores several items in one."""
    if value is None:
        return value
    if not server.delimiters:
        raise Refused(name, value, "start the server with --enable-mis, or use /v1/score")
    ids: Sequence[int] = request.input_ids or ()
    ordered = all(a < b for a, b in zip((-1, *value), (*value, max(len(ids), 1)), strict=True))
    if not value or not ordered:
        raise Refused(name, value, f"use ascending positions in the prompt's {len(ids)} token ids")
    return value


def objects_only(name: str, value: Any, request: Any, server: Server) -> Any:
    """What JSON cannot say; programs around an Engine pass objects of SGLang's own type."""
    if value is not None and type(value) not in server.resident:
        raise Refused(name, value, "leave it out: it cannot be given in JSON")
    return value


def custom_params(name: str, value: Any, request: Any, server: Server) -> Any:
    """Anything; our list of watched pages as text, which every form of SGLang's messages can carry."""
    asked = value.get("lsa") if isinstance(value, dict) else None
    pages = asked.get("watch") if isinstance(asked, dict) else None
    if isinstance(pages, list) and all(type(page) is int for page in pages):
        return value | {"lsa": asked | {"watch": ",".join(map(str, pages))}}
    return value


def timestamp(name: str, value: Any, request: Any, server: Server) -> Any:
    """When the request came, as this process's clock has it; the client's clock is another."""
    return value if value is None or 0 <= value <= time.perf_counter() else None
