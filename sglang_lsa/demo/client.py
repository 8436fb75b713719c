"""Asks a server through its OpenAI-compatible chat: streaming, greedy, with the times of the tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from sglang_lsa.streaming import RequestFailed, Stream, encoded, follow, median_gap, session
from sglang_lsa.texts.document import Question

MODEL = "SmolLM2-135M-Instruct"
ANSWER_TOKENS = 20
"""Enough for a sentence with the number; the small model rambles on after it."""
TIMEOUT_SECONDS = 900.0


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
        RequestFailed: the server refused a request, or an answer ended too early.
        aiohttp.ClientError: the server broke down, or said nothing for :data:`TIMEOUT_SECONDS`.
    """

    async def ask() -> list[Answer]:
        async with session(TIMEOUT_SECONDS) as http:
            return [await _ask(http, url, request, done) for request in requests]

    return asyncio.run(ask())


def ask_at_once(url: str, requests: Sequence[Request], done: Callable[[], None] = nothing) -> list[Answer]:
    """Ask all questions at the same time; else as :func:`ask_in_sequence`."""

    async def ask() -> list[Answer]:
        async with session(TIMEOUT_SECONDS) as http:
            return await asyncio.gather(*(_ask(http, url, request, done) for request in requests))

    return asyncio.run(ask())


async def _ask(http: aiohttp.ClientSession, url: str, request: Request, done: Callable[[], None]) -> Answer:
    rid = f"demo-{uuid.uuid4().hex}"
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": request.question.messages,
        "temperature": 0,
        "max_tokens": request.tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "rid": rid,
        "ignore_eos": request.ignore_eos,
    }
    if request.lsa is not None:
        body["custom_params"] = {"lsa": request.lsa}
    sent = encoded(body)
    stream = await follow(http, f"{url}/v1/chat/completions", sent, Stream())
    times, text = stream.text_times, stream.text.strip()
    if not stream.usage or len(times) < 2:
        counts = stream.usage or None
        raise RequestFailed(f"the answer to {rid} ended after {len(times)} pieces of text, token counts: {counts}")
    done()
    return Answer(
        rid=rid,
        text=text,
        right=request.question.answered_by(text),
        prompt_tokens=stream.prompt_tokens,
        cached_tokens=stream.cached or 0,
        completion_tokens=stream.count,
        ttft=times[0] - stream.sent,
        tpot=(times[-1] - times[0]) / (stream.count - 1),
        itl=median_gap(times),
    )
