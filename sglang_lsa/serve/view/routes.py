"""``GET /lsa`` and ``GET /lsa/events``: the live view's page and its stream of snapshots."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from sglang_lsa.serve.view.events import Broadcast, Stream, TooManyStreams
from sglang_lsa.serve.view.guard import HEADERS, content_security_policy, refusal

PAGE = pathlib.Path(__file__).with_name("page.html")


class EventResponse(StreamingResponse):
    """A stream of events; it is closed however it ends, also before its first event."""

    def __init__(self, broadcast: Broadcast, stream: Stream):
        super().__init__(broadcast.events(stream), media_type="text/event-stream", headers=HEADERS)
        self.broadcast, self.stream = broadcast, stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.broadcast.close(self.stream)


def add_routes(router: APIRouter, broadcast: Broadcast, off: Callable[[], bool] = lambda: False) -> None:
    """Add the live view to ``router``.

    Args:
        broadcast: over a source of snapshots.
        off: whether both addresses are not found; looked up when one is used.
    """
    text = PAGE.read_text(encoding="utf-8")
    page_headers = {**HEADERS, "Content-Security-Policy": content_security_policy(text)}

    @router.get("/lsa", include_in_schema=False)
    async def page(request: Request) -> Response:
        """The page. It holds no data."""
        return _refused(request, off(), opened=True) or HTMLResponse(text, headers=page_headers)

    @router.get("/lsa/events", include_in_schema=False)
    async def events(request: Request) -> Response:
        """Snapshots, see ``sglang_lsa.serve.view.snapshot``, as server-sent events."""
        if refused := _refused(request, off()):
            return refused
        try:
            return EventResponse(broadcast, broadcast.open())
        except TooManyStreams as error:
            return _error(503, str(error))


def _refused(request: Request, off: bool, opened: bool = False) -> Response | None:
    if off:
        return _error(404, "the live view is off: start the server without --lsa-disable-view")
    found = refusal(request.headers, opened)
    return _error(*found) if found else None


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, headers=HEADERS)
