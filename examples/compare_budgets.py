"""Ask a running server the same question under several budgets, and see what each request kept on the device.

    python -m sglang_lsa.launch_server --port 30000        # in another terminal
    python examples/compare_budgets.py --url http://127.0.0.1:30000 --document notes.txt --question "Who paid?"

Without a document, a number is hidden in 6,000 tokens of filler.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import urllib.request
import uuid
from typing import Any

import openai

ASKED: dict[str, dict[str, Any]] = {
    "full attention": {"enabled": False},
    "budget 30 %": {"budget": 0.3},
    "server's default": {},
    "budget 7 %": {"budget": 0.07},
    "recency": {"policy": "recency"},
}
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
FACT = "One of the special magic numbers for amber-falcon is: 7316452.\n"
QUESTION = "What is the special magic number for amber-falcon mentioned in the text above?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--document", type=pathlib.Path, help="a text file; default: filler with a hidden number")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args()
    document = args.document.read_text() if args.document else FILLER * 90 + FACT + FILLER * 150
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    for name, options in ASKED.items():
        rid = uuid.uuid4().hex
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"{document}\n{args.question}"}],
            max_tokens=args.max_tokens,
            temperature=0,
            extra_body={"rid": rid, "custom_params": {"lsa": options}},
        )
        with urllib.request.urlopen(f"{args.url}/lsa/status") as status:
            (request,) = (entry for entry in json.load(status)["finished"] if entry["rid"] == rid)
        read = f"{request['resident_pages']} of {request['context_pages']} pages"
        print(f"{name:>16}  {read:>16}  {(answer.choices[0].message.content or '').strip()!r}")


if __name__ == "__main__":
    main()
