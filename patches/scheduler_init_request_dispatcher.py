"""The scheduler takes changes of its configuration, one at a time, between two batches."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.status import config_in_force


def take_config_changes(result, self):
    from sglang.utils import TypeBasedDispatcher

    from sglang_lsa.patches.config_messages import LSAConfigReq

    self._request_dispatcher += TypeBasedDispatcher([(LSAConfigReq, lambda request: reconfigure(self, request))])


def reconfigure(scheduler, request):
    """Change all of it or nothing; the answer goes back to where the request came from."""
    from sglang_lsa.patches.config_messages import LSAConfigReqOutput

    lsa = scheduler.tp_worker.model_runner.lsa
    try:
        lsa.reconfigure(request.values)
    except ValueError as error:
        return LSAConfigReqOutput(in_force=config_in_force(lsa), problem=str(error))
    return LSAConfigReqOutput(in_force=config_in_force(lsa))


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
    kind="after",
    function=take_config_changes,
    parameters=("self",),
    why="SGLang's message for changing a running scheduler carries numbers only and says no reason.",
    until="SGLang lets plugins add control messages.",
    test="tests/server/test_control.py::test_a_change_is_answered_with_what_is_in_force",
)
