"""A streaming HTTP client that notes when every token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Stream:
    """One request: when it was sent, and when how many tokens had arrived."""

    sent: float
    times: list[float] = field(default_factory=list)
    """Seconds, of every chunk."""
    tokens: list[int] = field(default_factory=list)
    """Tokens received up to and including that chunk."""
    cached: int = 0
    """Prompt tokens that the server's radix tree already had."""
    done: bool = False


class RequestFailed(RuntimeError):
    """The server answered a request of the benchmark with an error."""


async def run_together(
    url: str, prompts: Sequence[Sequence[int]], tokens: int, custom_params: dict[str, Any] | None = None
) -> list[Stream]:
    """Send all prompts at once and read until the first of them has all of its ``tokens``; abort the others.

    Raises:
        RequestFailed: the server refused or dropped one.
    """
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 20) as session:
        bodies = [request_body(prompt, tokens, custom_params) for prompt in prompts]
        streams = [Stream(time.perf_counter()) for _ in prompts]
        tasks = [
            asyncio.create_task(_read(session, url, body, tokens, stream))
            for body, stream in zip(bodies, streams, strict=True)
        ]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()
        return streams


def request_body(prompt: Sequence[int], tokens: int, custom_params: dict[str, Any] | None) -> bytes:
    """What is sent; made before the clock starts, for a prompt of 256K numbers takes tens of milliseconds to write."""
    parameters: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    if custom_params:
        parameters["custom_params"] = custom_params
    return json.dumps({"input_ids": list(prompt), "sampling_params": parameters, "stream": True}).encode()


async def _read(session, url, body: bytes, tokens, stream: Stream) -> None:
    try:
        await _follow(session, url, body, stream)
    except aiohttp.ClientError as error:
        raise RequestFailed(f"the server dropped a request: {error!r}") from error
    if not stream.tokens or stream.tokens[-1] < tokens:
        raise RequestFailed(f"ended after {stream.tokens[-1] if stream.tokens else 0} of {tokens} tokens")
    stream.done = True


async def _follow(session, url, body: bytes, stream: Stream) -> None:
    headers = {"Content-Type": "application/json"}
    async with session.post(url + "/generate", data=body, headers=headers) as answer:
        if answer.status != 200:
            raise RequestFailed(f"HTTP {answer.status}: {(await answer.text())[:500]}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RequestFailed(str(chunk["error"]))
            stream.times.append(now)
            stream.tokens.append(chunk["meta_info"]["completion_tokens"])
            stream.cached = chunk["meta_info"].get("cached_tokens", 0)
