"""A request to ``/v1/responses`` that SGLang cannot translate is the client's mistake."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.screen.request import refusing


async def make(original, self, request, prev_response, tokenizer, **options):
    with refusing("the request"):
        return await original(self, request, prev_response, tokenizer, **options)


HOOK = Hook(
    target="sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._make_request",
    kind="around",
    function=make,
    parameters=("self", "request", "prev_response", "tokenizer"),
    why="An input without a message is HTTP 500.",
    until="SGLang answers HTTP 400.",
    test="tests/server/test_screen.py::test_refused_and_alive",
    needs="openai_harmony",
)
