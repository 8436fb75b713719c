"""How many tokens a second, and how soon: long prompts at the same time, with LSA and, if there is one, stock SGLang.

    python -m sglang_lsa.launch_server --port 30000 --lsa-device-tokens 16384 --lsa-min-context 1024
    python -m sglang_lsa.stock_server --model-path "$(python -m sglang_lsa.embedded_model)" --port 30001 \\
        --max-total-tokens 16384
    python examples/throughput.py --stock http://127.0.0.1:30001

Three terminals; without --stock the second is not needed. A comparison is fair when both servers have the same device
pool: this program asks them, and says so if not. On a GPU stock SGLang is `python -m sglang.launch_server`. SGLang's
own `python -m sglang.bench_serving` works with both servers as well.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai

from sglang_lsa.client import NoServer, get_finished, get_status, pool_bytes, savings, work

WORDS = (
    "falcon",
    "harbor",
    "lantern",
    "meadow",
    "orchard",
    "river",
    "mountain",
    "copper",
    "letter",
    "garden",
    "winter",
)


@dataclass(frozen=True)
class Answer:
    """Seconds are as the client saw them: to the first token, and for each one after it."""

    rid: str
    prompt_tokens: int
    tokens: int
    ttft: float
    tpot: float


async def ask(client: Any, model: str, prompt: str, tokens: int) -> Answer:
    rid, sent, times, usage = uuid.uuid4().hex, time.perf_counter(), [], None
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"rid": rid, "ignore_eos": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices:
            times.append(time.perf_counter())
    if usage is None or usage.completion_tokens < 2:
        raise RuntimeError("a stream ended too early; the server's log says why")
    return Answer(
        rid,
        usage.prompt_tokens,
        usage.completion_tokens,
        times[0] - sent,
        (times[-1] - times[0]) / (usage.completion_tokens - 1),
    )


async def ask_all(url: str, prompts: list[str], tokens: int) -> tuple[list[Answer], float]:
    """All answers, and the seconds until the last one ended."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600, max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, model, prompt, tokens) for prompt in prompts))
        return list(answers), time.perf_counter() - start


def measure(url: str, prompts: list[str], tokens: int) -> tuple[dict[str, float], list[Answer]]:
    answers, seconds = asyncio.run(ask_all(url, prompts, tokens))
    figures = {"output tokens/s": sum(answer.tokens for answer in answers) / seconds}
    for name, values in (("TTFT", [a.ttft for a in answers]), ("TPOT", [a.tpot for a in answers])):
        figures |= {f"{name} p{p} ms": float(np.percentile(values, p)) * 1e3 for p in (50, 99)}
    return figures, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server with LSA")
    parser.add_argument("--stock", metavar="URL", help="a server without, to compare with")
    parser.add_argument("--requests", type=int, default=8, help="at the same time; default: 8")
    parser.add_argument("--words", type=int, default=4000, help="in each prompt, about as many tokens; default: 4000")
    parser.add_argument("--tokens", type=int, default=64, help="in each answer; default: 64")
    args = parser.parse_args()
    if min(args.requests, args.words) < 1 or args.requests > 64 or args.tokens < 2:
        parser.error("use 1 to 64 requests, 1 word or more, 2 tokens or more")
    rng = random.Random(time.time_ns())  # new prompts each time: nothing of them is cached
    prompts = [" ".join(rng.choices(WORDS, k=args.words)) for _ in range(args.requests)]
    before = get_status(args.url)
    pools = {url: pool_bytes(url) for url in filter(None, (args.url, args.stock))}
    figures, answers = measure(args.url, prompts, args.tokens)
    after = get_status(args.url)
    saved = savings(after, get_finished(args.url, [answer.rid for answer in answers]))
    stock = measure(args.stock, prompts, args.tokens)[0] if args.stock else {}
    longest = max(answer.prompt_tokens for answer in answers)
    print(f"{len(answers)} prompts of up to {longest:,} tokens at once, {args.tokens} tokens each")
    print(f"{'':>16} {'LSA':>10}" + (f" {'stock':>10} {'ratio':>7}" if stock else ""))
    for name, value in figures.items():
        compared = f" {stock[name]:>10.1f} {value / stock[name]:>6.2f}x" if stock else ""
        print(f"{name:>16} {value:>10.1f}{compared}")
    print(f"{'pool MB':>16}" + "".join(f" {size / 1e6:>10.1f}" for size in pools.values()))
    if args.stock and not 0.9 < pools[args.url] / pools[args.stock] < 1.1:
        print("Not a fair comparison: the pools differ (--lsa-device-tokens here, --max-total-tokens there).")
    print(f"\nsaved: {saved}")
    print(f"the server: {work(before, after)}")


if __name__ == "__main__":
    try:
        main()
    except (NoServer, RuntimeError, openai.OpenAIError) as error:
        raise SystemExit(f"throughput.py: {error}") from None
