"""A chat or completion request that SGLang cannot translate is the client's mistake."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.screen.request import refusing


def convert(original, self, request, raw_request=None):
    with refusing("the request"):
        return original(self, request, raw_request)


def _hook(target: str) -> Hook:
    return Hook(
        target=f"sglang.srt.entrypoints.openai.{target}._convert_to_internal_request",
        kind="around",
        function=convert,
        parameters=("self", "request", "raw_request"),
        why="What chat templates and tool schemas stumble over is HTTP 500.",
        until="SGLang answers HTTP 400.",
        test="tests/server/test_screen.py::test_refused_and_alive",
    )


CHAT = _hook("serving_chat.OpenAIServingChat")
COMPLETION = _hook("serving_completions.OpenAIServingCompletion")
