"""Write docs/configuration.md from the code: every flag, key of the JSON file and key of a request.

python scripts/make_docs.py          # write it
python scripts/make_docs.py --check  # fail if it is not what would be written
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

from sglang_lsa import config
from sglang_lsa.config import LSAConfig, RequestOptions

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
NOTE = "<!-- Written by scripts/make_docs.py from sglang_lsa/config.py; change it there. -->"

REQUEST = {
    "enabled": ("`true`", "`true`, `false`", "`false`: every step reads all pages, as stock SGLang does."),
    "policy": ("the server's", "", "How this request's pages are chosen; `indexer` only where the server has one."),
    "budget": ("the server's", "", "Upper bound of its resident sets, as a fraction of its pages."),
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
    "watch": (
        "`[]`",
        "page numbers, at most 256",
        "Pages whose score and rank `/lsa/requests` tells of the request, for every set that was predicted.",
    ),
}
"""Keys of ``custom_params.lsa``: default, allowed values ("" for those of the flag), meaning."""

HEAD = """# Configuration

Every option is a flag of the server, a key of the file that `--lsa-config FILE.json` names, and a key of
`sgl.Engine(lsa_config={...})`, which also takes the path of such a file; flags win over the file. The options in the
second table can be given for one request. What is wrong is refused: at start before a model is loaded, in a request
with HTTP 400; the answer says what was wrong, what was seen and what is allowed. Any `--lsa-*` flag switches LSA on in
`python -m sglang.launch_server`; `python -m sglang_lsa.launch_server` has it on. No environment variable matters.

## Of a server
"""

REQUEST_HEAD = """## Of a request

In `custom_params.lsa`: with SGLang's own API in `sampling_params`, with the OpenAI client in `extra_body`.

```python
client.chat.completions.create(..., extra_body={"custom_params": {"lsa": {"budget": 0.3}}})
```
"""


def page() -> str:
    """The whole file."""
    return "\n".join([NOTE, "", HEAD, *server_table(), "", REQUEST_HEAD, *request_table(), ""])


def server_table() -> list[str]:
    lines = ["| flag | key | allowed | default | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(LSAConfig):
        flag, default = "--lsa-" + field.name.replace("_", "-"), "" if field.default is None else f"`{field.default}`"
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
    if kind == "str":
        return "a path"
    if kind.startswith("tuple"):
        return "whole numbers; in JSON a list"
    if field.name in config._LEAST:
        number = "whole number" if kind == "int" else "number"
        return f"{number}, {config._LEAST[field.name]} or more"
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
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print(f"{PAGE.name} is not up to date: run python scripts/make_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
