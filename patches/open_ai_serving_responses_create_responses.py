"""``/v1/responses`` has no ``custom_params``; it says so when they are given."""

from __future__ import annotations

from sglang_lsa.patches.elsewhere import require_none
from sglang_lsa.patches.hook import Hook


async def answer(original, self, request, raw_request=None):
    await require_none(raw_request)
    return await original(self, request, raw_request)


HOOK = Hook(
    target="sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
    kind="around",
    function=answer,
    parameters=("self", "request", "raw_request"),
    why="It ignores what it does not know: the client would believe that it got what it asked for.",
    until="It has custom_params.",
    test="tests/server/test_screen.py::test_options_are_never_dropped",
    needs="openai_harmony",
)
