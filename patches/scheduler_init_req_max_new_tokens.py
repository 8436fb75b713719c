"""A request that can never run is refused when it arrives."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def refuse_impossible(result, self, req):
    if req.to_finish is None and (reason := self.tp_worker.model_runner.lsa.admission.refusal(req)):
        req.set_finish_with_abort(reason)


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
    kind="after",
    function=refuse_impossible,
    parameters=("self", "req"),
    why="SGLang checks prompts against virtual tokens; a request that reads all of them needs them on the device.",
    until="Decode streams pages from the host mirror.",
    test="tests/server/test_bad_input.py::test_refused_and_harmless",
)
