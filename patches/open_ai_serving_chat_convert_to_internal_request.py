"""A chat request that SGLang cannot translate is the client's mistake."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.screen.request import refusing


def convert(original, self, request, raw_request=None):
    with refusing("the request"):
        return original(self, request, raw_request)


HOOK = Hook(
    target="sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
    kind="around",
    function=convert,
    parameters=("self", "request", "raw_request"),
    why="What chat templates and tool schemas stumble over is HTTP 500.",
    until="SGLang answers HTTP 400.",
    test="tests/server/test_screen.py::test_refused_and_alive",
)
