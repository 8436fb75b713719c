"""Protocols without a place for our options say so, instead of dropping them."""

from __future__ import annotations

from typing import Any

from sglang_lsa.screen.header import EXAMPLE


async def require_none(raw_request: Any) -> None:
    """Raise HTTP 400 for a body that asks for our options where other protocols have them."""
    body = None if raw_request is None else await raw_request.json()
    custom = body.get("custom_params") if isinstance(body, dict) else None
    if isinstance(custom, dict) and "lsa" in custom:
        from fastapi import HTTPException

        raise HTTPException(400, f"custom_params.lsa has no place in this protocol: send the header {EXAMPLE}")
