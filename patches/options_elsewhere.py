"""Protocols without a place for our options say so, instead of dropping them."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.screen.header import EXAMPLE


async def answer(original, self, request, raw_request=None):
    if raw_request is not None and named(await raw_request.json()):
        from fastapi import HTTPException

        raise HTTPException(400, f"custom_params.lsa has no place in this protocol: send the header {EXAMPLE}")
    return await original(self, request, raw_request)


def named(body) -> bool:
    """Whether a body asks for our options where another protocol has them."""
    custom = body.get("custom_params") if isinstance(body, dict) else None
    return isinstance(custom, dict) and "lsa" in custom


def _hook(target: str) -> Hook:
    return Hook(
        target=f"sglang.srt.entrypoints.{target}",
        kind="around",
        function=answer,
        parameters=("self", "request", "raw_request"),
        why="These protocols ignore what they do not know: the client would believe that it got what it asked for.",
        until="They have custom_params.",
        test="tests/server/test_screen.py::test_options_are_never_dropped",
    )


RESPONSES = _hook("openai.serving_responses.OpenAIServingResponses.create_responses")
MESSAGES = _hook("anthropic.serving.AnthropicServing.handle_messages")
OLLAMA_CHAT = _hook("ollama.serving.OllamaServing.handle_chat")
OLLAMA_GENERATE = _hook("ollama.serving.OllamaServing.handle_generate")
