"""One request against the table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sglang_lsa.serve.screen import rules, sampling_rules
from sglang_lsa.serve.screen.rules import Refused, Server
from sglang_lsa.serve.screen.table import FIELDS, SAMPLING, Row

ONE_EACH = (
    "rid",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_sampling_mask",
    "return_hidden_states",
    "lora_path",
    "lora_id",
    "custom_logit_processor",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "decode_tp_size",
    "extra_key",
)
"""Fields that are a list for a batch of prompts. For one prompt SGLang would hand the list itself to its scheduler."""
UNCHECKED = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, AssertionError, re.error)
"""What reading a malformed request raises in code that expects a well-formed one."""
DROPPED_NAMES = frozenset(row.sampling for row in SAMPLING if row.rule is rules.dropped)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Inside, SGLang only reads the client's request: what it stumbles over is the client's to mend, so HTTP 400.

    Raises:
        ValueError: in place of :data:`UNCHECKED`.
    """
    try:
        yield
    except UNCHECKED as error:
        raise ValueError(
            f"{what} cannot be read: {type(error).__name__}: {error}: see that every field has its type"
        ) from error


def screen_samples(request: Any) -> None:
    """Before SGLang makes one request of each prompt and sample: how many samples.

    Raises:
        Refused: too many, or no number.
    """
    given = request.sampling_params
    for parameters in given if isinstance(given, list) else [given]:
        if isinstance(parameters, dict) and "n" in parameters:
            parameters["n"] = sampling_rules.samples("sampling_params.n", parameters["n"], request, None)  # type: ignore[arg-type]


def screen(request: Any, server: Server) -> None:
    """Check one request, and put the values to pass on in the place of those that were given.

    Args:
        request: like SGLang's ``GenerateReqInput`` for one prompt, with its defaults filled in.

    Raises:
        Refused: naming the field, the value seen, and what to do.
    """
    for name in ONE_EACH:
        value = getattr(request, name, None)
        if isinstance(value, list):
            if len(value) != 1:
                raise Refused(name, value, "use one value for one prompt")
            setattr(request, name, value[0])
    for row in FIELDS:
        if hasattr(request, row.field):
            setattr(request, row.field, row.rule(row.field, getattr(request, row.field), request, server))
    request.sampling_params = screen_sampling(request.sampling_params, request, server)


def screen_sampling(parameters: Any, request: Any, server: Server) -> dict[str, Any]:
    """The sampling parameters to pass on; the ones given are left as they are, since a batch shares them."""
    if not isinstance(parameters, dict):
        raise Refused("sampling_params", parameters, "use an object")
    known = known_names(server)
    unknown = [name for name in parameters if name not in known and name not in DROPPED_NAMES]
    if unknown:
        raise Refused("sampling_params has the key", unknown[0], f"use {', '.join(known)}")
    kept: dict[str, Any] = {}
    for row in SAMPLING:
        name = str(row.sampling)
        if name in parameters and row.rule is not rules.dropped:
            kept[name] = row.rule(row.field, parameters[name], request, server)
    return kept


def known_names(server: Server) -> list[str]:
    """Keys of ``sampling_params`` that clients of this server may use."""
    names = [str(row.sampling) for row in SAMPLING if row.rule is not rules.dropped]
    return [name for name in names if server.sampling is None or name in server.sampling]


def row_of(field: str, rows: Sequence[Row] = (*SAMPLING, *FIELDS)) -> Row | None:
    """The row of a field, by its name in SGLang or in an OpenAI protocol; None if there is none."""
    for row in rows:
        if field in (row.field, row.sampling, *row.also):
            return row
    return None
