"""Rules for single fields of a request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_lsa.serve.screen.rules import INT64, LARGEST_FLOAT32, Refused, Server, text


def name_of_request(name: str, value: Any, request: Any, server: Server) -> Any:
    """A text with at least one character: SGLang ends every request whose name begins with the one to end."""
    if not text(name, value, request, server):
        raise Refused(name, value, "use a text of at least one character, or leave it out")
    return value


def some_tokens(name: str, value: Any, request: Any, server: Server) -> Any:
    """At least one; whether each is in the vocabulary is checked where the prompt is admitted."""
    if value is not None and not value:
        raise Refused(name, value, "use at least one token id in every prompt")
    return value


def rows_of_floats(name: str, value: Any, request: Any, server: Server) -> Any:
    """``[tokens, hidden_size]`` for a model in bfloat16, the only type that SGLang casts embeddings to."""
    if value is None:
        return value
    if server.dtype != "bfloat16":
        raise Refused(name, "given", f"this server computes in {server.dtype}; start it with --dtype bfloat16")
    if session_of(request) is not None:
        raise Refused(name, "given", "leave out session_params: a session continues token ids")
    try:
        rows = np.asarray(value, dtype=np.float64)
        fine = rows.ndim == 2 and rows.shape[1] == server.hidden_size and bool((np.abs(rows) <= LARGEST_FLOAT32).all())
    except (TypeError, ValueError, OverflowError):  # ragged, or no numbers
        fine = False
    if not fine or not len(rows):
        raise Refused(name, value, f"use rows of {server.hidden_size} numbers that float32 can hold")
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
    for key, item in (value if value is not None else {}).items():
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


def delimiters(name: str, value: Any, request: Any, server: Server) -> Any:
    """Ascending positions in the prompt; nothing on a server that does not score several items in one."""
    if value is None or not server.delimiters:
        return None
    ids: Sequence[int] = request.input_ids or ()
    ordered = all(a < b for a, b in zip((-1, *value), (*value, max(len(ids), 1)), strict=True))
    if not value or not ordered:
        raise Refused(name, value, f"use ascending positions in the prompt's {len(ids)} token ids")
    return value


def pooled(name: str, value: Any, request: Any, server: Server) -> Any:
    """The same, and refused where it would be left out: the answer would be of another position."""
    if value is not None and not server.delimiters:
        raise Refused(name, value, "start the server with --enable-mis, or leave it out")
    return delimiters(name, value, request, server)


def objects_only(name: str, value: Any, request: Any, server: Server) -> Any:
    """What JSON cannot say; programs around an Engine pass objects of SGLang's own type."""
    if value is not None and type(value) not in server.resident:
        raise Refused(name, value, "leave it out: it cannot be given in JSON")
    return value


def known_labels(name: str, value: Any, request: Any, server: Server) -> Any:
    """Labels that the server's metrics have, as SGLang itself chooses from a header."""
    return value and {label: text for label, text in value.items() if label in server.labels}


def timestamp(name: str, value: Any, request: Any, server: Server) -> Any:
    """When the request came, as this process's clock has it; the client's clock is another."""
    return value if value is None or 0 <= value <= time.perf_counter() else None
