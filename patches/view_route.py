"""``GET /lsa`` and ``GET /lsa/events``: the live view, fed by SGLang's scheduler process."""

from __future__ import annotations

from typing import Any

from sglang_lsa.serve.view.answer import VIEW
from sglang_lsa.serve.view.events import Broadcast
from sglang_lsa.serve.view.routes import add_routes


def add_view_route(router: Any) -> None:
    """Add the live view; with ``--lsa-disable-view`` its addresses are not found.

    Routes are added before SGLang reads its arguments, so that whether it is off is looked up when one is used.
    SGLang's own ``--api-key`` protects them like any other of its routes.
    """
    from sglang.srt.entrypoints import http_server

    def off() -> bool:
        return http_server._global_state.tokenizer_manager.server_args.lsa_config.disable_view

    add_routes(router, Broadcast(ask), off)


async def ask() -> str:
    """The first scheduler's snapshot, see ``scheduler_get_internal_state``.

    Must run to its end: SGLang matches answers to requests by their order, so that giving up a request would hand its
    answer to the next one.
    """
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager = http_server._global_state.tokenizer_manager
    manager.auto_create_handle_loop()
    answers = await manager.get_internal_state_communicator(GetInternalStateReq(rid=VIEW))
    return answers[0].internal_state[VIEW]
