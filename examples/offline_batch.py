"""A batch of long prompts without a server: SGLang's offline engine with LSA.

    python examples/offline_batch.py                                       # four made-up prompts
    python examples/offline_batch.py --model-path MODEL --input prompts.jsonl --output answers.jsonl
    python examples/offline_batch.py --lsa '{"budget": 0.07}' --engine '{"chunked_prefill_size": 2048}'

A line of the input is {"prompt": "..."}; it may also have "lsa", what this prompt asks for, and SGLang's sampling
parameters. Prompts are computed together; a prefix that they share is computed and stored once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

import sglang as sgl

from sglang_lsa.client import engine_requests, last_stays, savings, work
from sglang_lsa.embedded_model import embedded_model_path

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NUMBERS = {"amber-falcon": "7316452", "calm-harbor": "4829163", "jolly-lantern": "2958714", "keen-meadow": "1846305"}
DEFAULT_LSA = {"budget": 0.2, "min_context": 1024}
TOGETHER = 32
"""Prompts that are given to the engine at a time; it remembers the last 64."""


def made_up_prompts() -> list[dict[str, Any]]:
    """One document of about 4,000 tokens, and a question about each number in it."""
    lines = [FILLER] * 160
    for i, (name, number) in enumerate(NUMBERS.items()):
        lines.insert(20 + 40 * i, f"One of the special magic numbers for {name} is: {number}.\n")
    text = "".join(lines)
    return [
        {"prompt": f"{text}\nThe special magic number for {name} mentioned in the text above is:"} for name in NUMBERS
    ]


def read_prompts(path: pathlib.Path) -> list[dict[str, Any]]:
    prompts = []
    for number, line in enumerate(filter(str.strip, path.read_text().splitlines()), start=1):
        try:
            prompts.append(json.loads(line))
            prompts[-1]["prompt"]
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f'{path}, line {number}: write an object like {{"prompt": "..."}}') from None
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="path or hub name; default: the embedded model")
    parser.add_argument("--input", type=pathlib.Path, help="JSON lines; default: made-up prompts")
    parser.add_argument("--output", type=pathlib.Path, help="JSON lines; default: the answers are printed")
    parser.add_argument("--lsa", type=json.loads, default=DEFAULT_LSA, metavar="JSON", help="as --lsa-config takes it")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="more arguments of sgl.Engine")
    parser.add_argument(
        "--status",
        type=pathlib.Path,
        metavar="FILE",
        help="where to write the engine's counters, and all it knows of the last 32 prompts",
    )
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    args = parser.parse_args()
    prompts = read_prompts(args.input) if args.input else made_up_prompts()
    if not prompts:
        raise SystemExit(f"{args.input} has no line: write one prompt a line")

    engine = sgl.Engine(model_path=args.model_path or str(embedded_model_path()), lsa_config=args.lsa, **args.engine)

    def status() -> dict[str, Any]:
        return engine.get_server_info()["internal_states"][0]["lsa"]

    def answers_to(some: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Prompts with their answers, and what LSA saved for each."""
        rids = [uuid.uuid4().hex for _ in some]
        parameters = [
            {
                "temperature": 0,
                "max_new_tokens": args.max_tokens,
                **{name: value for name, value in asked.items() if name not in ("prompt", "lsa")},
                "custom_params": {"lsa": asked.get("lsa", {})},
            }
            for asked in some
        ]
        answers = engine.generate([asked["prompt"] for asked in some], parameters, rid=rids)
        now, finished = status(), last_stays(engine_requests(engine)["finished"], rids)
        for asked, seen, answer in zip(some, finished, answers, strict=True):
            yield {**asked, "answer": answer["text"], "rid": seen["rid"], "saved": savings(now, [seen])}

    try:
        before, total, last = status(), [], []
        with args.output.open("w") if args.output else contextlib.nullcontext() as output:
            for first in range(0, len(prompts), TOGETHER):
                last = []
                for answered in answers_to(prompts[first : first + TOGETHER]):
                    last.append(answered["rid"])
                    total.append(answered["saved"])
                    if output:
                        print(json.dumps({**answered, "saved": str(answered["saved"])}), file=output)
                    else:
                        print(f"...{answered['prompt'][-70:]!r}: {answered['answer']!r}\n    {answered['saved']}")
        after = status()
        if args.status:
            details = {rid: engine_requests(engine, rid) for rid in last}
            args.status.write_text(json.dumps({**after, "requests": details}))
        print(f"\n{len(prompts)} prompts: {sum(total[1:], total[0])}")
        print(work(before, after))
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine's processes import this file again
    try:
        main()
    except ValueError as error:  # a configuration or a prompt's options that are refused
        raise SystemExit(f"offline_batch.py: {error}") from None
