"""``/server_info`` and ``/lsa/status`` show what the scheduler process knows."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.status import status


def add_status(result, self, recv_req):
    result.internal_state["lsa"] = status(self.tp_worker.model_runner.lsa)
    return result


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.get_internal_state",
    kind="after",
    function=add_status,
    parameters=("self", "recv_req"),
    why="Page state lives in the scheduler process; HTTP in another.",
    until="SGLang lets plugins add to the internal state.",
    test="tests/server/test_requests.py::test_status_and_server_info",
)
