"""Protocols without a place for our options say so, instead of dropping them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.screen.header import EXAMPLE


def refuses_options(target: str, *, raises_mistakes: bool = False, needs: str = "") -> Hook:
    """The hook on a handler of such a protocol.

    Args:
        target: the handler, ``async handler(self, request, raw_request)``.
        raises_mistakes: it leaves ValueError, SGLang's own way to say that a request is wrong, to HTTP 500.
        needs: see :class:`Hook`.
    """

    async def answer(original, self, request, raw_request=None):
        await require_none(raw_request)
        with answering_mistakes() if raises_mistakes else nullcontext():
            return await original(self, request, raw_request)

    return Hook(
        target=target,
        kind="around",
        function=answer,
        parameters=("self", "request", "raw_request"),
        why="It ignores what it does not know: the client would believe that it got what it asked for.",
        until="It has custom_params.",
        test="tests/server/test_screen.py::test_options_are_never_dropped",
        needs=needs,
    )


@contextmanager
def answering_mistakes() -> Iterator[None]:
    """Inside, ValueError is HTTP 400."""
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
