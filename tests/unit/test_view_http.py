"""The live view without a server: streams, who is answered, and the page of a server that wants its key."""

from __future__ import annotations

import asyncio
import json
import tracemalloc

import aiohttp
import pytest
from aiohttp import web

from sglang_lsa.cli import main
from sglang_lsa.serve.view.events import Broadcast, TooManyStreams, encode_event
from sglang_lsa.serve.view.forward import application
from sglang_lsa.serve.view.guard import refusal
from sglang_lsa.server_process import held_port

# --- streams ---------------------------------------------------------------------------------------------------------


class Counter:
    """Answers with how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.error: Exception | None = None

    async def __call__(self) -> str:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return json.dumps(self.asked)


def test_one_poller_for_all_streams() -> None:
    async def scenario() -> None:
        ask = Counter()
        broadcast = Broadcast(ask, seconds=0.01)
        streams = [broadcast.open() for _ in range(5)]
        events = [broadcast.events(stream) for stream in streams]
        for number in range(1, 6):
            seen = {await anext(event) for event in events}
            assert seen == {encode_event(str(number))}
        assert ask.asked == 5
        for stream in streams:
            broadcast.close(stream)
            broadcast.close(stream)
        assert broadcast.poller is not None
        await asyncio.wait_for(broadcast.poller, 5)
        assert ask.asked <= 6
        assert broadcast.poller is None
        again = broadcast.open()
        assert await again.next() == encode_event(str(ask.asked))
        broadcast.close(again)

    asyncio.run(scenario())


def test_a_slow_page_misses_events_and_costs_nothing() -> None:
    """500 events of 100 KB that it does not read: one is kept."""

    async def scenario() -> None:
        async def ask() -> str:
            return json.dumps("x" * 100_000)

        broadcast = Broadcast(ask, seconds=0)
        slow, quick = broadcast.open(), broadcast.open()
        await quick.next()
        tracemalloc.start()
        for _ in range(500):
            await quick.next()
        now, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert now < 1_500_000
        assert slow.missed >= 500
        assert quick.missed == 0
        assert await slow.next() == encode_event(json.dumps("x" * 100_000))
        broadcast.close(slow)
        broadcast.close(quick)

    asyncio.run(scenario())


def test_streams_are_limited() -> None:
    async def scenario() -> None:
        broadcast = Broadcast(Counter(), seconds=0.01, most=2)
        first, second = broadcast.open(), broadcast.open()
        with pytest.raises(TooManyStreams, match="2 pages are open, the most there may be: close one"):
            broadcast.open()
        broadcast.close(first)
        third = broadcast.open()
        broadcast.close(second)
        broadcast.close(third)
        assert not broadcast.streams

    asyncio.run(scenario())


def test_a_scheduler_that_does_not_answer_is_shown_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        ask = Counter()
        ask.error = RuntimeError("gone")
        broadcast = Broadcast(ask, seconds=0.01)
        stream = broadcast.open()
        event = json.loads((await stream.next()).decode().removeprefix("data: "))
        assert event == {"error": "the scheduler did not answer: RuntimeError('gone')"}
        ask.error = None
        while (newest := await stream.next()).startswith(b'data: {"error"'):
            pass
        assert newest == encode_event(str(ask.asked))
        broadcast.close(stream)

    asyncio.run(scenario())
    assert "asking the scheduler for the live view failed" in caplog.text


# --- who is answered -------------------------------------------------------------------------------------------------

NAVIGATION = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}

REQUESTS: list[tuple[dict[str, str], bool, int | None]] = [
    # (headers, for the page itself, status of the refusal)
    ({}, False, None),
    ({"sec-fetch-site": "same-origin"}, False, None),
    ({"sec-fetch-site": "none"}, True, None),
    ({"origin": "http://server:30000"}, False, None),
    ({"origin": "https://SERVER:30000"}, False, None),
    ({"origin": "http://server:30001"}, False, 403),
    ({"origin": "http://evil.example"}, False, 403),
    ({"origin": "http://evil.example"}, True, 403),
    ({"origin": "null"}, False, 403),
    ({"origin": "file://server:30000"}, False, 403),
    ({"origin": "http://[server:30000"}, False, 403),
    ({"origin": ""}, False, 403),
    ({"sec-fetch-site": "cross-site"}, False, 403),
    ({"sec-fetch-site": "same-site"}, False, 403),
    (NAVIGATION, True, None),
    (NAVIGATION, False, 403),
    ({**NAVIGATION, "sec-fetch-dest": "iframe"}, True, 403),
    ({"content-length": "0"}, False, None),
    ({"content-length": "1"}, False, 413),
    ({"content-length": "many"}, False, 413),
    ({"transfer-encoding": "chunked"}, True, 413),
]


@pytest.mark.parametrize(("headers", "opened", "status"), REQUESTS, ids=str)
def test_refusals(headers: dict[str, str], opened: bool, status: int | None) -> None:
    found = refusal({"host": "server:30000", **headers}, opened)
    assert (found and found[0]) == status
    assert refusal(headers, opened) is not None or "origin" not in headers, "an origin needs a host to agree with"


# --- the page of a server that wants its key -----------------------------------------------------------------------


async def forwarded(server: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and text of what ``sglang-lsa view`` answers."""
    runner = web.AppRunner(application(server))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{runner.addresses[0][1]}{path}", headers=headers) as answer,
        ):
            return answer.status, await answer.text()
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("path", "headers", "status", "words"),
    [
        ("/lsa", {}, 200, "sglang-lsa: live view"),
        ("/lsa", {"Host": "evil.example"}, 403, "is not this machine's"),
        ("/lsa/events", {"Host": "evil.example:80"}, 403, "is not this machine's"),
        ("/lsa/events", {"Origin": "http://evil.example"}, 403, "another origin"),
        ("/lsa/events", {"Sec-Fetch-Site": "cross-site"}, 403, "another site"),
        ("/lsa/events", {}, 502, "cannot be reached"),
        ("/lsa/status", {}, 404, ""),
    ],
)
def test_the_forwarder(path: str, headers: dict[str, str], status: int, words: str) -> None:
    """Over a server that is not there."""
    with held_port() as nobody_listens:
        url = f"http://127.0.0.1:{nobody_listens.getsockname()[1]}"
        seen, text = asyncio.run(forwarded(url, path, headers))
    assert seen == status
    assert words in text


def test_the_forwarder_passes_the_key_on() -> None:
    async def scenario() -> None:
        async def events(request: web.Request) -> web.Response:
            known = request.headers.get("Authorization") == "Bearer secret"
            return web.Response(text="data: 1\n\n", content_type="text/event-stream", status=200 if known else 401)

        app = web.Application()
        app.add_routes([web.get("/lsa/events", events)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        assert await forwarded(url, "/lsa/events", {"Authorization": "Bearer secret"}) == (200, "data: 1\n\n")
        assert (await forwarded(url, "/lsa/events", {}))[0] == 401
        await runner.cleanup()

    asyncio.run(scenario())


@pytest.mark.parametrize("text", ["server", "ftp://server", "http://", "http://server/?key=secret"])
def test_bad_addresses_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["view", text])
    assert "is no address of a server: write http://host:port" in capsys.readouterr().err
