"""What the benchmarks' client sends and times, and which part of it counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sglang_lsa.bench.client import run_together
from sglang_lsa.bench.plateau import plateau
from sglang_lsa.streaming import RequestFailed, Stream

# --- the plateau -----------------------------------------------------------------------------------------------------


def first_done() -> Stream:
    return Stream(0.5, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], done=True)


def last_started() -> Stream:
    """Two tokens a chunk."""
    return Stream(0.5, [3, 4, 5, 6, 7], [1, 3, 5, 7, 9])


@pytest.mark.parametrize(("skip", "seconds", "tokens"), [(0, 3, 9), (1, 2, 6), (2, 2, 6), (3, 1, 3)])
def test_a_plateau_begins_after_the_skipped_tokens_of_the_last_request(skip: int, seconds: float, tokens: int) -> None:
    found = plateau([first_done(), last_started()], skip)
    assert (found.running, found.seconds, found.tokens) == (2, seconds, tokens)
    assert found.tokens_per_s == 3


def test_pace_and_time_to_first_token() -> None:
    found = plateau([first_done(), last_started()], 1)
    assert sorted(found.itl_ms.tolist()) == [500, 500, 1000, 1000]
    assert [found.percentile(q) for q in (0, 50, 100)] == [500, 750, 1000]
    assert (found.ttft_s, found.ttft_last_s) == (1.5, 2.5), "of 0.5 and 2.5"


@pytest.mark.parametrize(
    "other",
    [Stream(0.0), Stream(0.0, [6.5, 7], [1, 2]), Stream(0.0, [6, 7], [1, 2])],
    ids=["never started", "started after the end", "started at the end"],
)
def test_requests_that_did_not_run_at_the_same_time_do_not_count(other: Stream) -> None:
    alone, together = (plateau([first_done(), *more, last_started()]) for more in ([], [other]))
    assert (together.running, together.seconds, together.tokens) == (alone.running, alone.seconds, alone.tokens)
    assert together.ttft_s == alone.ttft_s


def test_the_first_that_finished_is_the_end() -> None:
    early = Stream(0, [1, 2, 5], [1, 2, 6], done=True)
    assert plateau([first_done(), early, last_started()]).seconds == 2


def test_one_request_is_a_plateau_of_its_own() -> None:
    found = plateau([first_done()], 2)
    assert (found.running, found.seconds, found.tokens, found.percentile(50)) == (1, 3, 3, 1000)


@pytest.mark.parametrize("streams", [[], [Stream(0)], [last_started()]], ids=["none", "no token", "running"])
def test_no_plateau_when_nothing_finished(streams: list[Stream]) -> None:
    with pytest.raises(ValueError, match="no request finished"):
        plateau(streams)


@pytest.mark.parametrize(
    ("streams", "skip"),
    [
        ([first_done(), Stream(0, [5.5, 6.5], [1, 2])], 0),
        ([first_done(), last_started()], 100),
        ([first_done()], 6),
    ],
    ids=["a moment", "all skipped", "one, all skipped"],
)
def test_no_plateau_when_nothing_is_left_to_measure(streams: list[Stream], skip: int) -> None:
    with pytest.raises(ValueError, match="did not overlap: ask for more tokens"):
        plateau(streams, skip)


# --- the client ------------------------------------------------------------------------------------------------------

Answer = Callable[[dict[str, Any], Callable[[Any], Awaitable[None]]], Awaitable[None]]


def ask(answer: Answer, prompts: Sequence[Sequence[int]], tokens: int, **more: Any) -> list[Stream]:
    """Send ``prompts`` to a server that answers with ``answer(body, send)``."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(chunk: Any) -> None:
            await response.write(
                b"data: " + (chunk if isinstance(chunk, str) else json.dumps(chunk)).encode() + b"\n\n"
            )

        await answer(body, send)
        await send("[DONE]")
        return response

    return serve(handle, prompts, tokens, **more)


def serve(handle: Any, prompts: Sequence[Sequence[int]], tokens: int, **more: Any) -> list[Stream]:
    async def both() -> list[Stream]:
        app = web.Application()
        app.router.add_post("/generate", handle)
        async with TestServer(app) as server:
            return await asyncio.wait_for(
                run_together(str(server.make_url("")).rstrip("/"), prompts, tokens, **more), 20
            )

    return asyncio.run(both())


def chunk(tokens: int) -> dict[str, Any]:
    return {"meta_info": {"completion_tokens": tokens, "cached_tokens": 5}}


@pytest.mark.parametrize("custom", [None, {"lsa": {"policy": "random"}}], ids=["stock", "lsa"])
def test_a_request_is_sent_and_its_tokens_are_timed(custom: dict[str, Any] | None) -> None:
    bodies = []

    async def answer(body: dict[str, Any], send: Callable[[Any], Awaitable[None]]) -> None:
        bodies.append(body)
        for tokens in (1, 4, 8):
            await send(chunk(tokens))
            await asyncio.sleep(0.002)

    (stream,) = ask(answer, [[11, 12, 13]], 8, custom_params=custom)
    assert stream.tokens == [1, 4, 8]
    assert stream.sent < stream.times[0] <= stream.times[1] <= stream.times[2]
    assert stream.cached == 5 and stream.done
    parameters: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    parameters |= {"custom_params": custom} if custom else {}
    assert bodies == [{"input_ids": [11, 12, 13], "sampling_params": parameters, "stream": True}]


def test_the_others_are_abandoned_when_the_first_has_all_its_tokens() -> None:
    begun: list[int] = []
    left: list[int] = []

    async def answer(body: dict[str, Any], send: Callable[[Any], Awaitable[None]]) -> None:
        (prompt,) = body["input_ids"]
        await send(chunk(1))
        begun.append(prompt)
        if prompt == 11:
            while len(begun) < 3:  # all are there at once
                await asyncio.sleep(0.001)
            await send(chunk(4))
        else:
            try:
                await asyncio.Event().wait()
            finally:
                left.append(prompt)

    streams = ask(answer, [[10], [11], [12]], 4)
    assert [stream.done for stream in streams] == [False, True, False]
    assert streams[1].tokens == [1, 4]
    assert all(stream.tokens in ([], [1]) for stream in (streams[0], streams[2]))
    assert sorted(left) == [10, 12]


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([], "ended after 0 of 4 tokens"),
        ([chunk(1), chunk(3)], "ended after 3 of 4 tokens"),
        ([chunk(1), {"error": {"message": "no room"}}], "no room"),
    ],
    ids=["nothing", "early end", "error in the stream"],
)
def test_a_request_that_got_too_little_failed(chunks: list[dict[str, Any]], words: str) -> None:
    async def answer(body: dict[str, Any], send: Callable[[Any], Awaitable[None]]) -> None:
        for each in chunks:
            await send(each)

    with pytest.raises(RequestFailed, match=words):
        ask(answer, [[10]], 4)


def test_a_request_that_was_refused_failed() -> None:
    async def handle(request: web.Request) -> web.Response:
        if (await request.json())["input_ids"] == [10]:
            return web.Response(status=400, text="prompt too long" + 600 * "!")
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(RequestFailed, match=r"HTTP 400: prompt too long!+$") as failure:
        serve(handle, [[9], [10]], 4)
    assert len(str(failure.value)) == len("HTTP 400: ") + 500
