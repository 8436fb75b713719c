"""``X-LSA`` on every route, and bodies that SGLang cannot even read: HTTP 400."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_lsa.serve.screen.header import HEADER, asked, parse
from sglang_lsa.serve.screen.request import UNCHECKED

READING = "request_body_to_args"
"""FastAPI's function that turns a body into a route's arguments."""


class OptionsHeader:
    """Reads ``X-LSA`` before the route does anything."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            options = parse(value for name, value in scope["headers"] if name == HEADER.encode())
        except ValueError as error:
            return await refused(str(error))(scope, receive, send)
        token = asked.set(options)
        try:
            await self.app(scope, receive, send)
        finally:
            asked.reset(token)


def refused(message: str) -> Response:
    """HTTP 400 in SGLang's form."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": 400}}, 400)


def add_screen(app: FastAPI) -> None:
    """Add both to SGLang's application; call before the server starts."""
    app.add_middleware(OptionsHeader)
    for kind in UNCHECKED:
        app.add_exception_handler(kind, unread)
    app.add_exception_handler(RequestValidationError, invalid(app.exception_handlers[RequestValidationError]))


async def unread(request: Request, error: Exception) -> Response:
    """HTTP 400 if the body's own validation raised; else as without us."""
    if not was_reading(error.__traceback__):
        raise error
    return refused(
        f"the body cannot be read: {type(error).__name__}: {error!a:.200}: see that every field has its type"
    )


def was_reading(traceback: TracebackType | None) -> bool:
    """Whether an exception arose while FastAPI read a body."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == READING:
            return True
        traceback = traceback.tb_next
    return False


def invalid(original: Any) -> Any:
    """SGLang's answer to a body that is not valid; or ours, if that one would repeat what is no Unicode."""

    async def handler(request: Request, error: RequestValidationError) -> Response:
        try:
            return await original(request, error)
        except (UnicodeError, TypeError):
            return refused(f"the body is not valid: {ascii(error.errors())[:400]}")

    return handler
