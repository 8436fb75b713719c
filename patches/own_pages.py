"""What is told of requests, and what changes a server, is for this server's own pages."""

from __future__ import annotations

from fastapi import HTTPException, Request

from sglang_lsa.serve.control import is_foreign


def refuse_foreign(request: Request) -> None:
    """SGLang answers pages of every website (CORS); what is known of requests is for this server's own ones.

    Raises:
        HTTPException: 403.
    """
    headers = request.headers
    if is_foreign(headers.get("origin"), headers.get("sec-fetch-site"), headers.get("host")):
        raise HTTPException(
            403, f"a page of {headers.get('origin', 'another site')!a:.80} asks: use a page of this server"
        )
