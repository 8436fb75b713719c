"""Nothing is sent of a request that lost its place while its pass was running."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def stream_output(original, self, reqs, *args, **kwargs):
    return original(self, [req for req in reqs if not req.is_retracted or req.finished()], *args, **kwargs)


HOOK = Hook(
    target="sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
    kind="around",
    function=stream_output,
    parameters=("self", "reqs"),
    why="SGLang sends no token, counts one as sent, and the logprob of the answer's first token is never sent.",
    until="SGLang leaves out retracted requests.",
    test="tests/unit/test_retraction.py::test_a_request_that_lost_its_place_loses_no_logprob",
    relies_on=("sglang.srt.managers.schedule_batch.Req.finished",),
)
