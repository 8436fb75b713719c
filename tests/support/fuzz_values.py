"""Values that the fuzz gives to fields and headers."""

from __future__ import annotations

from typing import Any

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 5, 63, 64, 65, -2, 100, 49151, 49152, 60_000, 2**31 - 1, 2**31, -(2**31) - 1),
    *(2**53, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-7, 1e-300, 1e39, -1e39, 1e308),
    *(
        "",
        "a",
        "5",
        "-1",
        "0.3",
        "true",
        "null",
        "(",
        "[0-9]+",
        "(a+)+$",
        "\x00",
        "\ud800",
        "é🙂﷽",
        "a" * 5000,
        "quest",
    ),
    *("{}", '{"type": "object"}', "root ::= ", 'root ::= "a"', "2.2.2.2", "HEALTH_CHECK", "job", "auto", "none"),
)
NESTED: tuple[Any, ...] = (
    *(
        [],
        {},
        [[]],
        [None],
        [1],
        [5, 6],
        [-1],
        ["a"],
        [True],
        [1.5],
        [[5, 6], [7]],
        [10**6],
        [10**30],
        [{}],
        ["a", "b"],
    ),
    *([0.1] * 576, [[0.1] * 576], [[0.1] * 3], {"5": 1.0}, {"5": "a"}, {"99999": 1}, {"-1": 1}, {"a": 1}, {"5": 1e39}),
    *({"lsa": {"budget": 0.3}}, {"lsa": 5}, {"lsa": {"watch": [0, 3]}}, {"id": [1]}, {"id": "x"}, {"rid": "x"}),
    *({"type": "json_schema"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}),
    *({"type": "structural_tag", "structures": [], "triggers": []}, {"effort": "low"}, {"include_usage": True}),
    *([{"type": "function", "function": {"name": "f", "parameters": 5}}], [{"role": "user", "content": None}]),
    *([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}], [{"role": "tool"}]),
    *({"function": {"name": "f"}, "type": "function"}, [{"type": "message", "role": "user", "content": "x"}]),
    *([{"type": "text", "text": "x"}], {"a": {"b": {"c": [1, [2, [3]]]}}}, [[[[[[]]]]]]),
)
FITTING: dict[str, tuple[Any, ...]] = {
    "integer": (0, 1, 2, 3, 5, -1, -2, 7, 64, 600, 49151, 49152, 60_000, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30),
    "number": (0, 1, -1, 0.0, 0.1, 0.5, 1.0, 1.5, 2.0, -2.0, 1e-300, 1e-7, 1e39, 1e308, -1e39, 10**30, 2**63),
    "boolean": (True, False),
    "string": (
        "",
        "a",
        "job",
        "5",
        "[0-9]+",
        "(",
        '{"type": "object"}',
        'root ::= "a"',
        "2.2.2.2",
        "é🙂",
        "last",
        "\x00",
    ),
    "array": (
        [],
        [5],
        [5, 6],
        [5] * 700,
        [[5, 6], [7]],
        ["a"],
        ["a", "b", ""],
        [0.5],
        [None],
        [True, False],
        [-1],
        [10**6],
    ),
    "object": (
        {},
        {"5": 1.0},
        {"5": -100},
        {"5": 1e39},
        {"id": "x"},
        {"rid": "x", "offset": 5},
        {"a": "b"},
        {"a": [1]},
    ),
    "null": (None,),
}
"""What a field of a declared type may well hold, and how far it goes."""
PARAMETERS: dict[str, str] = (
    dict.fromkeys(("max_new_tokens", "min_new_tokens", "top_k", "n", "stream_interval", "sampling_seed"), "integer")
    | dict.fromkeys(("temperature", "top_p", "min_p", "top_k", "frequency_penalty", "presence_penalty"), "number")
    | dict.fromkeys(("ignore_eos", "skip_special_tokens", "no_stop_trim", "spaces_between_special_tokens"), "boolean")
    | dict.fromkeys(("stop", "stop_regex", "regex", "ebnf", "json_schema", "structural_tag"), "string")
    | {"repetition_penalty": "number", "stop_token_ids": "array", "logit_bias": "object", "custom_params": "object"}
)
"""Types of sampling parameters, which SGLang's own description leaves open."""
HEADERS: tuple[tuple[str, str], ...] = (
    *(("X-LSA", text) for text in ("budget=0.3", "budget=9", "watch=0,3,5", "sets=1:2", "=", "a", "budget", "policy=")),
    *(("X-LSA", text) for text in ("budget=0.3,budget=0.3", "enabled=false", "record=5", "x" * 9000, "budget=\xff")),
    *(("Content-Type", text) for text in ("text/plain", "", "application/json; charset=utf-16", "multipart/form-data")),
    *(("X-Data-Parallel-Rank", text) for text in ("0", "5", "-1", "a", "99999999999999999999")),
    *(("Origin", text) for text in ("http://example.com", "null", "\xff")),
    *(("Sec-Fetch-Site", "cross-site"), ("Accept", "\xff"), ("x-smg-routing-key", "\xff"), ("Host", "example.com")),
    *(("Authorization", "Bearer x"), ("Transfer-Encoding", "identity"), ("Expect", "100-continue"), ("A" * 100, "b")),
)
