"""``GET /lsa/status``: what the ledger and every running request hold, beside SGLang's own routes."""

from __future__ import annotations

from typing import Any


def add_routes() -> None:
    """Add the routes to SGLang's HTTP application; call before the server starts."""
    from fastapi import APIRouter
    from sglang.srt.entrypoints import http_server

    from sglang_lsa.patches.control_route import add_control_route
    from sglang_lsa.patches.screen_middleware import add_screen
    from sglang_lsa.patches.view_route import add_view_route

    router = APIRouter()
    add_view_route(router)

    @router.get("/lsa/status")
    async def status() -> dict[str, Any]:
        """Status of each scheduler, see ``sglang_lsa.status``; the first one's at the top level."""
        states = await http_server._global_state.tokenizer_manager.get_internal_state()
        return states[0]["lsa"]

    http_server.app.include_router(router)
    add_control_route(http_server.app)
    add_screen(http_server.app)
