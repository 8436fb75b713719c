"""The live view of a server that wants its API key: a browser cannot send one when it opens a page.

This machine serves the page, on its loopback address, and passes the stream on, with the key that is typed there.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from aiohttp import web

from sglang_lsa.serve.view.guard import HEADERS, content_security_policy, refusal
from sglang_lsa.serve.view.routes import PAGE

CHUNK = 1 << 16
"""Bytes that are passed on at a time; aiohttp stops reading while the page does not read."""


def application(server: str) -> web.Application:
    """
    Args:
        server: address of the server, ``http://host:port``.
    """
    text = PAGE.read_text(encoding="utf-8")
    address = server.rstrip("/") + "/lsa/events"

    async def page(request: web.Request) -> web.StreamResponse:
        headers = {**HEADERS, "Content-Security-Policy": content_security_policy(text)}
        return _refused(request, opened=True) or web.Response(text=text, content_type="text/html", headers=headers)

    async def events(request: web.Request) -> web.StreamResponse:
        if refused := _refused(request):
            return refused
        key = request.headers.get("Authorization")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(address, headers={"Authorization": key} if key else {}, allow_redirects=False) as source,
            ):
                return await _pass_on(request, source)
        except aiohttp.ClientConnectorError as error:
            return _error(502, f"{server} cannot be reached ({error.os_error.strerror}): is the server running?")

    app = web.Application()
    app.add_routes([web.get("/lsa", page), web.get("/lsa/events", events)])
    return app


async def _pass_on(request: web.Request, source: aiohttp.ClientResponse) -> web.StreamResponse:
    answer = web.StreamResponse(status=source.status, headers={**HEADERS, "Content-Type": source.content_type})
    await answer.prepare(request)
    async for chunk in source.content.iter_chunked(CHUNK):
        await answer.write(chunk)
    await answer.write_eof()
    return answer


def _refused(request: web.Request, opened: bool = False) -> web.Response | None:
    # A website can let its own name point here; a browser then takes the answer for that site's.
    if request.url.host not in ("127.0.0.1", "localhost"):
        return _error(403, f"host {request.host!r:.80} is not this machine's: open http://127.0.0.1")
    found = refusal({name.lower(): value for name, value in request.headers.items()}, opened)
    return _error(*found) if found else None


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status, headers=HEADERS)


async def serve(server: str, port: int, ready: Any = print) -> None:
    """Serve until cancelled.

    Args:
        port: on this machine; 0 for any that is free.
        ready: called with the page's address.

    Raises:
        OSError: the port is taken.
    """
    runner = web.AppRunner(application(server), handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        ready(f"http://127.0.0.1:{runner.addresses[0][1]}/lsa")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
