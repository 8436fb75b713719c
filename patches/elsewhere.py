"""Protocols without a place for our options say so, instead of dropping them."""

from __future__ import annotations

from typing import Any

from sglang_lsa.screen.header import EXAMPLE


async def answer(original, self, request, raw_request=None):
    """Around a route's handler: HTTP 400 for a body that asks for our options where another protocol has them."""
    if raw_request is not None and named(await raw_request.json()):
        from fastapi import HTTPException

        raise HTTPException(400, f"custom_params.lsa has no place in this protocol: send the header {EXAMPLE}")
    return await original(self, request, raw_request)


def named(body: Any) -> bool:
    """Whether a body has our options where other protocols have them."""
    custom = body.get("custom_params") if isinstance(body, dict) else None
    return isinstance(custom, dict) and "lsa" in custom
