"""The scheduler takes changes of its configuration and tells what it knows, one at a time, between two batches."""

from __future__ import annotations

import logging

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.one_request import collect, overview
from sglang_lsa.serve.status import config_in_force, status

logger = logging.getLogger(__name__)


def take_messages(result, self):
    from sglang.utils import TypeBasedDispatcher

    from sglang_lsa.patches.config_messages import LSAConfigReq
    from sglang_lsa.patches.status_messages import LSAStatusReq

    self._request_dispatcher += TypeBasedDispatcher(
        [
            (LSAConfigReq, lambda request: reconfigure(self, request)),
            (LSAStatusReq, lambda request: tell(self, request)),
        ]
    )


def reconfigure(scheduler, request):
    """Change all of it or nothing; the answer goes back to where the request came from."""
    from sglang_lsa.patches.config_messages import LSAConfigReqOutput

    lsa = scheduler.tp_worker.model_runner.lsa
    try:
        lsa.reconfigure(request.values)
    except ValueError as error:
        return LSAConfigReqOutput(in_force=config_in_force(lsa), problem=str(error))
    return LSAConfigReqOutput(in_force=config_in_force(lsa))


def tell(scheduler, request):
    """What is asked for. A description that fails must not take the scheduler with it."""
    from sglang_lsa.patches.status_messages import LSAStatusReqOutput

    lsa = scheduler.tp_worker.model_runner.lsa
    try:
        if not request.requests:
            return LSAStatusReqOutput(told=status(lsa))
        return LSAStatusReqOutput(told=overview(lsa) if request.named is None else collect(lsa, request.named))
    except Exception as error:
        logger.exception("LSA: the scheduler could not say what it knows; it goes on")
        return LSAStatusReqOutput(told={}, problem=f"the scheduler could not describe itself: {error!r}")


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
    kind="after",
    function=take_messages,
    parameters=("self",),
    why="SGLang's message for changing a running scheduler carries numbers only and says no reason; its question for "
    "the state of one collects every server argument.",
    until="SGLang lets plugins add control messages.",
    test="tests/server/test_control.py::test_a_change_is_answered_with_what_is_in_force",
    relies_on=("sglang.utils.TypeBasedDispatcher",),
)
