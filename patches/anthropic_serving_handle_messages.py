"""``/v1/messages`` has no ``custom_params``; it says so when they are given."""

from __future__ import annotations

from sglang_lsa.patches.elsewhere import refuses_options

HOOK = refuses_options("sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages")
