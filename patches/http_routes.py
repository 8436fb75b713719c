"""``GET /lsa/status``, ``/lsa/config`` and ``/lsa/requests``: what a scheduler knows, beside SGLang's own routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from sglang_lsa.patches.own_pages import refuse_foreign
from sglang_lsa.serve.control import IN_FORCE
from sglang_lsa.serve.one_request import formatted
from sglang_lsa.serve.view.guard import HEADERS


def add_routes() -> None:
    """Add the routes to SGLang's HTTP application; call before the server starts."""
    from sglang.srt.entrypoints import http_server

    # With several HTTP workers this process passes their messages on, and must be able to read them.
    import sglang_lsa.patches.config_messages
    import sglang_lsa.patches.status_messages  # noqa: F401
    from sglang_lsa.patches.control_route import add_control_route
    from sglang_lsa.patches.screen_middleware import add_screen
    from sglang_lsa.patches.view_route import add_view_route

    router = APIRouter()
    add_view_route(router)
    add_status_routes(router, lambda: http_server._global_state.tokenizer_manager)
    http_server.app.include_router(router)
    add_control_route(http_server.app)
    add_screen(http_server.app)


def add_status_routes(router: APIRouter, manager: Callable[[], Any]) -> None:
    """Add what is told of a server and of its requests.

    Args:
        manager: returns SGLang's tokenizer manager; asked when a route is used, since it is made after them.
    """

    @router.get("/lsa/status")
    async def status(request: Request) -> Response:
        """Counters of the first scheduler, see ``sglang_lsa.serve.status``."""
        refuse_foreign(request)
        (first, *_) = await ask(manager())
        return _json(json.dumps(first))

    @router.get("/lsa/config")
    async def config(request: Request) -> Response:
        """What the server runs with, as ``POST /lsa/config`` answers when it has changed it."""
        refuse_foreign(request)
        (first, *_) = await ask(manager())
        return _json(json.dumps({name: first[name] for name in IN_FORCE}))

    @router.get("/lsa/requests")
    async def requests(request: Request, rid: str | None = None) -> Response:
        """All that is known of the requests with this id; without one, a few numbers of those that run and of the last
        ones that finished. See ``sglang_lsa.serve.one_request``."""
        refuse_foreign(request)
        found = await ask(manager(), requests=True, named=rid)
        return _json(await asyncio.to_thread(_written, found))  # long ones take a while, and others want an answer


async def ask(manager: Any, **what: Any) -> list[dict[str, Any]]:
    """What each scheduler tells; see ``status_messages``.

    Args:
        manager: SGLang's tokenizer manager, of a server or of an engine.

    Raises:
        HTTPException: 500; a scheduler could not say.
    """
    from sglang_lsa.patches.status_messages import LSAStatusReq

    manager.auto_create_handle_loop()
    answers = await manager.lsa_status_communicator(LSAStatusReq(**what))
    for answer in answers:
        if answer.problem:
            raise HTTPException(500, answer.problem)
    return [answer.told for answer in answers]


def together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Formatted requests of all schedulers (several with data parallelism) in one."""
    told = [formatted(one) for one in found]
    return {
        "finished": [entry for one in told for entry in one["finished"]],
        "running": [entry for one in told for entry in one["running"]],
        "more_running": sum(one["more_running"] for one in told),
    }


def _written(found: list[dict[str, Any]]) -> str:
    return json.dumps(together(found))


def _json(text: str) -> Response:
    return Response(text, media_type="application/json", headers=HEADERS)
