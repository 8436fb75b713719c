"""Ask a running server the same question under several budgets, and see what each request kept on the device.

    python -m sglang_lsa.launch_server --port 30000 --lsa-config '{"floor_tokens": 0}'    # in another terminal
    python examples/compare_budgets.py --url http://127.0.0.1:30000 --document notes.txt --question "Who paid?"

Without a document, a number is hidden in filler. By default no set is bounded below 1,536 tokens, so that of contexts
up to 11,000 tokens several budgets are one.
"""

from __future__ import annotations

import argparse
import pathlib
import uuid
from typing import Any

import openai

from sglang_lsa.client import NoServer, get_finished, get_status, savings

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
    parser.add_argument("--tokens", type=int, default=6000, help="of the filler, about; default: 6000")
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args()
    lines = args.tokens // 25
    document = args.document.read_text() if args.document else FILLER * (lines // 3) + FACT + FILLER * (lines * 2 // 3)
    get_status(args.url)
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
        saved = savings(get_status(args.url), get_finished(args.url, [rid]))
        print(f"{name:>16}  {saved}  {(answer.choices[0].message.content or '').strip()!r}")


if __name__ == "__main__":
    try:
        main()
    except (NoServer, openai.OpenAIError) as error:
        raise SystemExit(f"compare_budgets.py: {error}") from None
