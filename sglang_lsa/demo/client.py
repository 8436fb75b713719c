"""Asks a server through the OpenAI client: streaming, greedy, with the times of the tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from sglang_lsa.texts.document import Question

MODEL = "SmolLM2-135M-Instruct"
ANSWER_TOKENS = 20
"""Enough for a sentence with the number; the small model rambles on after it."""
TIMEOUT_SECONDS = 900.0


class ServerBroke(RuntimeError):
    """A stream ended too early; the message names the request."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A question and how to ask it.

    Args:
        lsa: the request's ``custom_params.lsa``; None sends none, as to a stock server.
        tokens: most tokens of the answer; exactly so many with ``ignore_eos``.
    """

    question: Question
    lsa: dict[str, Any] | None = None
    tokens: int = ANSWER_TOKENS
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back for one request, and how fast. Times are seconds seen by the client."""

    rid: str
    text: str
    right: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft: float
    """From sending the request to its first token."""
    tpot: float
    """Mean time per output token after the first."""
    itl: float
    """Median time between two tokens; less disturbed than the mean by other work on the machine."""


def nothing() -> None:
    """What to call after an answer when nobody waits for it."""


def ask_in_sequence(url: str, requests: Sequence[Request], done: Callable[[], None] = nothing) -> list[Answer]:
    """Ask one question after the other; calls ``done`` after each.

    Raises:
        openai.OpenAIError: the server refused a request, broke down, or did not answer in time.
        ServerBroke: an answer ended too early.
    """

    async def ask() -> list[Answer]:
        async with _client(url) as client:
            return [await _ask(client, request, done) for request in requests]

    return asyncio.run(ask())


def ask_at_once(url: str, requests: Sequence[Request], done: Callable[[], None] = nothing) -> list[Answer]:
    """Ask all questions at the same time; else as :func:`ask_in_sequence`."""

    async def ask() -> list[Answer]:
        async with _client(url) as client:
            return await asyncio.gather(*(_ask(client, request, done) for request in requests))

    return asyncio.run(ask())


def _client(url: str) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_SECONDS, max_retries=0)


async def _ask(client: Any, request: Request, done: Callable[[], None]) -> Answer:
    rid = f"demo-{uuid.uuid4().hex}"
    extra: dict[str, Any] = {"rid": rid, "ignore_eos": request.ignore_eos}
    if request.lsa is not None:
        extra["custom_params"] = {"lsa": request.lsa}
    sent = time.perf_counter()
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=request.question.messages,
        temperature=0,
        max_tokens=request.tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    pieces, times, usage = [], [], None
    async for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
            times.append(time.perf_counter())
    if usage is None or len(times) < 2:
        raise ServerBroke(f"the answer to {rid} ended after {len(times)} pieces of text, token counts: {usage}")
    text = "".join(pieces).strip()
    details = usage.prompt_tokens_details
    done()
    return Answer(
        rid=rid,
        text=text,
        right=request.question.answered_by(text),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        completion_tokens=usage.completion_tokens,
        ttft=times[0] - sent,
        tpot=(times[-1] - times[0]) / (usage.completion_tokens - 1),
        itl=statistics.median(later - earlier for earlier, later in itertools.pairwise(times)),
    )
