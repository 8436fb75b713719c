"""A request that the scheduler cannot take in is refused; the scheduler goes on."""

from __future__ import annotations

import logging
from http import HTTPStatus

from sglang_lsa.patches.hook import Hook

logger = logging.getLogger(__name__)


def handle(original, self, recv_req, **options):
    try:
        return original(self, recv_req, **options)
    except Exception as error:
        from sglang.srt.managers.io_struct import AbortReq

        logger.exception("refused the request %.80r, which could not be taken in", recv_req.rid)
        message = f"the request cannot be taken in: {type(error).__name__}: {error}: see that every field has its type"
        reason = {"type": "abort", "status_code": HTTPStatus.BAD_REQUEST, "message": message}
        self.ipc_channels.send_to_tokenizer.send_output(AbortReq(rid=recv_req.rid, finished_reason=reason), recv_req)


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.handle_generate_request",
    kind="around",
    function=handle,
    parameters=("self", "recv_req"),
    why="What comes past the screen (an Engine, gRPC) would end the scheduler with an exception; nothing is held yet.",
    until="SGLang answers such a request.",
    test="tests/unit/test_screen.py::test_intake_refuses_what_it_cannot_take",
    relies_on=("sglang.srt.managers.io_struct.AbortReq",),
)
