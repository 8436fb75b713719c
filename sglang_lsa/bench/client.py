"""Requests that decode at the same time, for a benchmark."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from sglang_lsa.streaming import RequestFailed, Stream, encoded, follow, session


async def run_together(
    url: str, prompts: Sequence[Sequence[int]], tokens: int, custom_params: dict[str, Any] | None = None
) -> list[Stream]:
    """Send all prompts at once and read until the first of them has all of its ``tokens``; abort the others.

    Raises:
        RequestFailed: the server refused or dropped one.
    """
    parameters: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    if custom_params:
        parameters["custom_params"] = custom_params
    common = {"sampling_params": parameters, "stream": True}
    async with session() as http:
        bodies = [encoded({"input_ids": list(prompt), **common}) for prompt in prompts]
        streams = [Stream() for _ in prompts]
        tasks = [
            asyncio.create_task(_read(http, url, body, tokens, stream))
            for body, stream in zip(bodies, streams, strict=True)
        ]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()
        return streams


async def _read(http: aiohttp.ClientSession, url: str, body: bytes, tokens: int, stream: Stream) -> None:
    try:
        await follow(http, f"{url}/generate", body, stream)
    except aiohttp.ClientError as error:
        raise RequestFailed(f"the server dropped a request: {error!r}") from error
    if stream.count < tokens:
        raise RequestFailed(f"ended after {stream.count} of {tokens} tokens")
    stream.done = True
