"""Write pages of docs: configuration.md (flags, keys of the JSON file and of a request), requests.md and metrics.md.

python scripts/make_docs.py          # write them
python scripts/make_docs.py --check  # fail if they are not what would be written
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys

from sglang_lsa.config import LSAConfig, RequestOptions
from sglang_lsa.config.allowed import AUTO, LEAST, SWITCH
from sglang_lsa.config.kinds import CONSTANT, FLAG, KEY, REMOVED, flag_of
from sglang_lsa.serve.metrics import markdown_table
from sglang_lsa.serve.screen.table import FIELDS, SAMPLING, Row

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
NOTE = "<!-- Written by scripts/make_docs.py from sglang_lsa/config; change it there. -->"

REQUEST = {
    "enabled": ("`true`", "`true`, `false`", "`false`: every step reads all pages, as stock SGLang does."),
    "policy": ("the server's", "", "How this request's pages are chosen; `indexer` only where the server has one."),
    "budget": (
        "the server's",
        "a share in (0, 1], or `auto`",
        "Upper bound of its resident sets, as a fraction of its pages; `auto` needs the policy `indexer`.",
    ),
    "prefill": ("the server's", "", "How its prompt reads the prefix that the radix tree has."),
    "sets": (
        "none",
        "`tokens:tail_start:p,p,p`, with `;` between sets",
        "Resident sets to read, for evaluation and replay: from so many tokens on, these pages and all from "
        "`tail_start` on. `/lsa/requests` tells the sets of a request in this form.",
    ),
    "record": (
        "0",
        "0 or more tokens",
        "How many of the prompt's last tokens are recorded as if they had been generated; needs `--lsa-record`.",
    ),
    "dense_steps": ("the server's", "0 or more steps", "Decode steps that read everything before its first set."),
    "prompt_lookup": (
        "the server's",
        "0 to 64 tokens",
        "Where so many tokens at the end of its text have occurred in it before, what follows there stays.",
    ),
    "widen": (
        "the server's",
        "1 to 4",
        "How many times the pages of its budget its sets may have while it repeats its prompt; 1 does not widen them.",
    ),
    "target_coverage": (
        "the server's",
        "a share in (0, 1]",
        "With a budget of `auto`: share of attention that its sets are to cover.",
    ),
    "max_budget": ("the server's", "a share in (0, 1]", "With a budget of `auto`: upper bound of its sets."),
    "groups": (
        "`true`",
        "`true`, `false`",
        "`false`: it reads no page that others chose, where the server forms groups, and its answer does not depend on "
        "who decodes beside it.",
    ),
    "watch": (
        "`[]`",
        "page numbers, at most 256; a list, or text as `0,3,5`",
        "Pages whose score and rank `/lsa/requests` tells of the request, for every set that was predicted.",
    ),
}
"""Keys of ``custom_params.lsa``: default, allowed values ("" for those of the flag), meaning."""

HEAD = """# Configuration

What is decided when a server starts is a flag, a key of what `--lsa-config` is given, a
JSON file or a JSON object, and of `sgl.Engine(lsa_config={...})`; flags win over the file. What can be changed
later has its own table, and so has what one request can ask for. What is wrong is refused: at start before a model is
loaded, in a request with HTTP 400; the answer says what was wrong, what was seen and what is allowed. Any `--lsa-*`
flag switches LSA on in `python -m sglang.launch_server`; `python -m sglang_lsa.launch_server` has it on. No environment
variable matters; `XDG_CACHE_HOME` moves the cache folder.

## When a server starts
"""

KEYS_HEAD = """## While it runs

Keys of the file and of `lsa_config`, but no flags. `POST /lsa/config` changes them on a running server, but for
`floor_tokens`, `groups` and `group_margin`, and `budget`, `policy` and `prefill` of the table above as well
([operating](operating.md#changing-it-while-it-runs)).
"""

CONSTANTS_HEAD = """## What is fixed

Part of the method, neither flag nor key.
"""

REMOVED_HEAD = """## Flags of earlier versions

Refused, with these words.
"""


REQUEST_HEAD = """## Of a request

In `custom_params.lsa`: with SGLang's own API in `sampling_params`, with the OpenAI client in `extra_body`.

```python
client.chat.completions.create(..., extra_body={"custom_params": {"lsa": {"budget": 0.3}}})
```
"""


REQUESTS_NOTE = "<!-- Written by scripts/make_docs.py from sglang_lsa/serve/screen/table.py; change it there. -->"
REQUESTS_HEAD = """# What a request may say

## Requests that end stock SGLang

SGLang's scheduler and detokenizer end with the first exception, and with them every client's request. Stock SGLang
0.5.17 passes on many values without a look, so that one request is enough; public bug reports name a dozen of them.
With LSA, one screen checks every field of `/generate`, `/v1/completions`, `/v1/chat/completions`, `/v1/responses`
and the other generating routes before anything reaches the scheduler. What cannot work is HTTP 400, with the field, the
value seen and what to do; what means nothing on this server is left out; what stock answers is answered.

The rows below are the screen itself. A test fails if the installed SGLang has a field without a row or a reason in
`sglang_lsa/serve/screen/harmless.py` why none is needed; `tests/server/test_screen.py` asks a real server, and
`python tests/support/fuzz.py` sends it ten thousand mutated requests.
"""
REQUESTS_TAIL = """
Seen on a stock server, or by calling the function of SGLang that raises: `max_new_tokens`, `min_new_tokens`, `top_k`,
`logit_bias`, `stop_token_ids`, `stop_regex`, `skip_special_tokens`, `is_normalized`, `rid`, `logprob_start_len`,
`top_logprobs_num`, `token_ids_logprob`, `input_embeds`, `bootstrap_host`. The other rows say what the source of SGLang
0.5.17 does.

Two things are mended rather than refused: logprobs of given tokens (`token_ids_logprob`) work beside requests that ask
for none, and a request that the scheduler cannot take in, however it came, is refused and not an end. What the screen
cannot know: how long a pattern of `stop_regex` takes to match (SGLang matches it in its scheduler), and what code a
`custom_logit_processor` runs, which is why SGLang wants a flag for it.

## Names of requests

Stock SGLang ends every request whose `rid` *begins* like the one that is aborted or hung up: `job-1` takes `job-10`
with it. And a stream that is refused because its `rid` is running ends the running one two seconds later. With LSA an
abort means one request and its samples (`n` > 1), and a stream's end concerns no request but its own.

## Options where the protocol has no place for them

`/v1/responses`, `/v1/messages`, `/api/chat` and `/api/generate` have no `custom_params`. The header `X-LSA` gives the
options of [configuration.md](configuration.md#of-a-request) on every route:

```bash
curl localhost:30000/v1/responses -H 'Content-Type: application/json' -H 'X-LSA: budget=0.3,policy=quest' \\
  -d '{"model": "default", "input": "Hello"}'
```

They are checked like the body's; an option that is given in both, with two values, is HTTP 400, and so is
`custom_params.lsa` in a body whose protocol would drop it.
"""


METRICS_NOTE = "<!-- Written by scripts/make_docs.py from sglang_lsa/serve/metric_table.py; change it there. -->"
METRICS_HEAD = """# Metrics

With `--enable-metrics` these are on `/metrics`, beside SGLang's own. Dashboard and alerts:
[examples/grafana](../examples/grafana/README.md); what to do about them: [Tuning](tuning.md#what-to-watch).
"""


def metrics_page() -> str:
    """Every metric."""
    return "\n".join([METRICS_NOTE, "", METRICS_HEAD, markdown_table(), ""])


def requests_page() -> str:
    """What a request may say."""
    return "\n".join([REQUESTS_NOTE, "", REQUESTS_HEAD, *screen_table(), REQUESTS_TAIL])


def screen_table() -> list[str]:
    lines = ["| field | allowed | stock SGLang 0.5.17 otherwise | not allowed, e.g. |", "| --- | --- | --- | --- |"]
    return lines + [screen_row(row) for row in (*SAMPLING, *FIELDS)]


def screen_row(row: Row) -> str:
    also = f" ({', '.join(f'`{name}`' for name in row.also)})" if row.also else ""
    example = f"`{row.example}`" if row.example else ""
    return f"| `{row.field}`{also} | {row.allowed} | {row.stock} | {example} |"


def page() -> str:
    """The whole file."""
    parts = [HEAD, *server_table(), "", KEYS_HEAD, *key_table(KEY), "", REQUEST_HEAD, *request_table(), ""]
    parts += [CONSTANTS_HEAD, *key_table(CONSTANT), "", REMOVED_HEAD, *removed_table(), ""]
    return "\n".join([NOTE, "", *parts])


def fields_of(kind: str) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(LSAConfig) if field.metadata["kind"] == kind]


def key_table(kind: str) -> list[str]:
    values = kind == KEY  # of a constant there is only one
    lines = ["| key | allowed | default | meaning |" if values else "| name | value | meaning |"]
    lines.append("| --- | --- | --- | --- |" if values else "| --- | --- | --- |")
    for field in fields_of(kind):
        default, allows = (
            "" if field.default is None else f"`{json.dumps(field.default)}`",
            f"{allowed(field)} | " if values else "",
        )
        lines.append(f"| `{field.name}` | {allows}{default} | {field.metadata['help']} |")
    return lines


def removed_table() -> list[str]:
    rows = [f"| `{flag_of(name)}` | {advice} |" for name, advice in REMOVED.items()]
    return ["| flag | what to do |", "| --- | --- |", *rows]


def server_table() -> list[str]:
    lines = ["| flag | key | allowed | default | meaning |", "| --- | --- | --- | --- | --- |"]
    lines.append("| `--lsa-config` | | a path, or a JSON object | | Options from a file, or as they are. |")
    for field in fields_of(FLAG):
        flag, default = flag_of(field.name), "" if field.default is None else f"`{field.default}`"
        if isinstance(field.default, bool):
            flag, default = f"{flag}`, `--no-{flag.removeprefix('--')}", f"`{str(field.default).lower()}`"
        lines.append(f"| `{flag}` | `{field.name}` | {allowed(field)} | {default} | {field.metadata['help']} |")
    return lines


def request_table() -> list[str]:
    names = [field.name for field in dataclasses.fields(RequestOptions)]
    if set(names) != set(REQUEST):
        raise SystemExit(f"make_docs.py: REQUEST describes {sorted(REQUEST)}, but a request can say {sorted(names)}")
    fields = {field.name: field for field in dataclasses.fields(LSAConfig)}
    lines = ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
    for name, (default, values, meaning) in REQUEST.items():
        lines.append(f"| `{name}` | {values or allowed(fields[name])} | {default} | {meaning} |")
    return lines


def allowed(field: dataclasses.Field) -> str:
    """What a field takes: its choices, or its type and range, which is found by trying."""
    kind = str(field.type).removesuffix(" | None")
    if field.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
    if kind == "bool":
        return "`true`, `false`"
    if kind == SWITCH:
        return f"`true`, `false`, `{AUTO}`"
    if kind == "str":
        return "a path"
    if kind.startswith("tuple"):
        return "whole numbers; in JSON a list"
    if field.name in LEAST:
        number = "whole number" if kind == "int" else "number"
        return f"{number}, {LEAST[field.name]} or more"
    if accepts(field.name, 1.5):
        return "number"
    return f"number in {'[' if accepts(field.name, 0.0) else '('}0, 1]"


def accepts(name: str, value: float) -> bool:
    try:
        LSAConfig(**{name: value})  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    pages = {"configuration.md": page(), "requests.md": requests_page(), "metrics.md": metrics_page()}
    for name, text in pages.items():
        path = DOCS / name
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{name} is not up to date: run python scripts/make_docs.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
