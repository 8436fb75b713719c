"""Protocols without a place for our options say so, instead of dropping them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_lsa.serve.screen.header import EXAMPLE


@contextmanager
def answering_mistakes() -> Iterator[None]:
    """Around a handler that leaves ValueError to HTTP 500, SGLang's own way to say that a request is wrong."""
    try:
        yield
    except ValueError as error:
        from fastapi import HTTPException

        raise HTTPException(400, str(error)) from error


async def require_none(raw_request: Any) -> None:
    """Raise HTTP 400 for a body that asks for our options where other protocols have them."""
    body = None if raw_request is None else await raw_request.json()
    custom = body.get("custom_params") if isinstance(body, dict) else None
    if isinstance(custom, dict) and "lsa" in custom:
        from fastapi import HTTPException

        raise HTTPException(400, f"custom_params.lsa has no place in this protocol: send the header {EXAMPLE}")
