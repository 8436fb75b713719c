"""``POST /lsa/config``: changes the configuration of the running server; protected like SGLang's admin endpoints."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_lsa.patches.own_pages import refuse_foreign
from sglang_lsa.serve.control import MAX_BYTES, parse_changes


def add_control_route(app: FastAPI) -> None:
    """Add the route to SGLang's application itself, not to a router that it includes.

    SGLang looks for an endpoint's auth level on the application's own routes. What current FastAPI includes with a
    router is not among them, and would be open to the plain API key, or to everybody where there is only an admin key.
    """

    @app.post("/lsa/config")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # as /flush_cache: the admin key if there is one, else the API key if any
    async def configure(request: Request) -> dict[str, Any]:
        """Change fields of the configuration, all of them or none; returns what is in force then."""
        from sglang.srt.entrypoints import http_server

        from sglang_lsa.patches.config_messages import LSAConfigReq

        refuse_foreign(request)
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, f"Content-Type is {kind!a:.80}: send application/json")
        try:
            values = parse_changes(await read_body(request))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        manager = http_server._global_state.tokenizer_manager
        manager.auto_create_handle_loop()
        answers = await manager.lsa_config_communicator(LSAConfigReq(values=values))
        for answer in answers:  # several with data parallelism; their configurations are the same, so are the answers
            if answer.problem:
                raise HTTPException(400, answer.problem)
        return answers[0].in_force


async def read_body(request: Request) -> bytes:
    """The body of a request, refused as soon as it is too large, whatever length it announced.

    Raises:
        HTTPException: 413.
    """
    too_large = HTTPException(413, f"the body has more than {MAX_BYTES} bytes: send the fields that change")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > MAX_BYTES:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise too_large
    return bytes(body)
