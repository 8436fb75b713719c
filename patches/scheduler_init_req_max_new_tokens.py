"""A request that can never run is refused when it arrives."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def refuse_impossible(result, self, req):
    if req.to_finish is None and (reason := self.tp_worker.model_runner.lsa.validate(req)):
        req.set_finish_with_abort(reason)


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
    kind="after",
    function=refuse_impossible,
    parameters=("self", "req"),
    why="SGLang checks prompts against virtual tokens; prefill still needs the prompt on the device.",
    until="Prefill streams its prefix from the host mirror.",
    test="tests/server/test_requests.py::test_prompt_beyond_the_device_pool_is_refused",
)
