"""A request that can never run is refused when it arrives."""

from __future__ import annotations

import logging

from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.requests import judge, options_of

logger = logging.getLogger(__name__)


def refuse_impossible(self, req, *args, **kwargs):
    """Judge each request once: what was retracted or preempted comes through the queue again, and may stay.

    This is the last stop before the queue. Any earlier, SGLang would still check its own limits, against the one token
    that is left of a refused prompt, and answer with those; and ``--allow-auto-truncate`` shortens prompts late.
    """
    if hasattr(req, "lsa_judged"):
        return
    req.lsa_judged = True
    if req.to_finish is None:
        from sglang.srt.runtime_context import get_serving

        admission = self.tp_worker.model_runner.lsa.admission
        if get_serving().allow_auto_truncate:
            truncate(req, admission)
        if reason := judge(admission, req):
            req.set_finish_with_abort(reason)
            req.routed_experts_start_len = 0  # may lie beyond the one token that is left


def truncate(req, admission):
    """Cut a prompt that must be whole on the device to what fits there, as SGLang does by its own limits."""
    most = admission.longest(options_of(admission, req))
    if most is not None and (tokens := len(req.origin_input_ids)) > most:
        logger.warning(
            "LSA: the prompt of %s has %d tokens, the device pool takes %d: truncated", req.rid, tokens, most
        )
        req.origin_input_ids = req.origin_input_ids[:most]
        req.logprob_start_len = min(req.logprob_start_len, most)


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
    kind="before",
    function=refuse_impossible,
    parameters=("self", "req"),
    why="SGLang checks prompts against virtual tokens; a request that reads all of them needs them on the device.",
    until="Decode streams pages from the host mirror.",
    test="tests/server/test_bad_input.py::test_refused_and_harmless",
    relies_on=(
        "sglang.srt.runtime_context.get_serving",
        "sglang.srt.managers.schedule_batch.Req.set_finish_with_abort",
    ),
)
