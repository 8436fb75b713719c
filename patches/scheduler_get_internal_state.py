"""``/server_info`` and the live view show what the scheduler process knows."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.status import status
from sglang_lsa.serve.view.answer import VIEW, snapshot_text


def add_status(original, self, recv_req):
    # SGLang's own state is every server argument, copied and made plain: too dear to collect once a second for a page
    # that shows none of it. The live view asks with the same request, told apart by its id.
    if recv_req.rid == VIEW:
        from sglang.srt.managers.io_struct import GetInternalStateReqOutput

        return GetInternalStateReqOutput(
            internal_state={VIEW: snapshot_text(self.tp_worker.model_runner.lsa, self.tree_cache)}
        )
    result = original(self, recv_req)
    result.internal_state["lsa"] = status(self.tp_worker.model_runner.lsa)
    return result


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.get_internal_state",
    kind="around",
    function=add_status,
    parameters=("self", "recv_req"),
    why="Page state lives in the scheduler process; HTTP in another.",
    until="SGLang lets plugins add to the internal state.",
    test="tests/server/test_requests.py::test_status_and_server_info",
    relies_on=("sglang.srt.managers.io_struct.GetInternalStateReqOutput",),
)
