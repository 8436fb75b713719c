"""Requests that are sent when they arrive, however long others take, and the server's own load meanwhile.

SGLang's ``sglang.benchmark.serving`` is not used: it waits between two requests instead of sending each at its time,
draws from numpy's global state, wants a tokenizer, and leaves requests that fail out of its figures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

from sglang_lsa.bench.load_mix import Request
from sglang_lsa.streaming import RequestFailed, Stream, follow, session

SAMPLE_SECONDS = 0.25
LOADS = "/v1/loads?include=core"


@dataclass
class Sent:
    """A request and what came of it. Times of the stream are seconds after the clock started; it was sent at its
    arrival, which may be some moments before the client came to it (``lag``, in seconds)."""

    request: Request
    stream: Stream
    lag: float = 0.0
    refused: str | None = None
    """Why the server did not answer it to its end, although it was given the time."""

    @property
    def done(self) -> bool:
        return self.stream.done


@dataclass
class Load:
    """One run.

    Attributes:
        seconds: during which requests arrived.
        end: seconds after the clock started when nothing was waited for any longer.
        running: requests that the server said were running, every quarter of a second while requests arrived.
        waiting: those that it said were waiting.
    """

    seconds: float
    sent: list[Sent]
    end: float = 0.0
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)


def body_of(request: Request, memories: Sequence[str]) -> bytes:
    """As it is sent.

    Args:
        memories: token ids of every memory, written with commas.
    """
    beginning = [] if request.memory is None else [memories[request.memory]]
    ids = ",".join([*beginning, written(request.own)])
    parameters = {"temperature": 0, "max_new_tokens": request.answer, "ignore_eos": True}
    return f'{{"input_ids":[{ids}],"sampling_params":{json.dumps(parameters)},"stream":true}}'.encode()


def written(tokens: np.ndarray) -> str:
    return ",".join(map(str, tokens.tolist()))


async def offer(
    url: str, requests: Sequence[Request], memories: Sequence[np.ndarray], seconds: float, patience: float
) -> Load:
    """Send every request at its time, for ``seconds``, and wait for those that are not done then.

    Args:
        memories: token ids of every memory.
        patience: seconds after the last moment of arrivals at which nothing is waited for any longer; what is still
            unfinished is dropped.
    """
    texts = [written(memory) for memory in memories]
    bodies = [body_of(request, texts) for request in requests]  # before the clock starts: writing takes its time
    load = Load(seconds, [Sent(request, Stream(request.at)) for request in requests])
    async with session() as http:
        began = time.perf_counter()
        tasks = [
            asyncio.create_task(_send(http, url, body, sent, began))
            for body, sent in zip(bodies, load.sent, strict=True)
        ]
        tasks.append(asyncio.create_task(_watch(http, url, load, began)))
        _, pending = await asyncio.wait(tasks, timeout=seconds + patience)
        load.end = max(seconds, time.perf_counter() - began)
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            raise error
    for sent in load.sent:  # from the client's clock to that of the run
        sent.stream.times = [now - began for now in sent.stream.times]
    return load


async def _send(http: aiohttp.ClientSession, url: str, body: bytes, sent: Sent, began: float) -> None:
    await asyncio.sleep(began + sent.request.at - time.perf_counter())
    sent.lag = max(0.0, time.perf_counter() - began - sent.request.at)
    try:
        await follow(http, f"{url}/generate", body, sent.stream)
    except (RequestFailed, aiohttp.ClientError, OSError, ValueError) as error:
        sent.refused = str(error) or repr(error)
        return
    sent.stream.done = sent.stream.count == sent.request.answer
    if not sent.stream.done:
        sent.refused = f"ended after {sent.stream.count} of {sent.request.answer} tokens"


async def _watch(http: aiohttp.ClientSession, url: str, load: Load, began: float) -> None:
    """Ask for the server's load while requests arrive; its ranks' together. What it does not answer is left out."""
    while (now := time.perf_counter() - began) < load.seconds:
        try:
            async with http.get(url + LOADS) as answer:
                ranks = (await answer.json())["loads"]
        except (aiohttp.ClientError, OSError, ValueError, KeyError):
            ranks = []
        if ranks:
            load.running.append(sum(rank["num_running_reqs"] for rank in ranks))
            load.waiting.append(sum(rank["num_waiting_reqs"] for rank in ranks))
        await asyncio.sleep(min(SAMPLE_SECONDS, max(0.0, load.seconds - now)))
