"""Which HTTP requests the live view answers, and the headers of what it answers.

SGLang lets every website read its answers (CORS for all origins). The view tells what a server is doing, so that a page
of another origin is refused here, before anything is asked of the scheduler.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping

from sglang_lsa.serve.control import is_foreign

HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
"""Of every answer."""


def refusal(headers: Mapping[str, str], opened: bool = False) -> tuple[int, str] | None:
    """HTTP status and message of a request that is not answered; None for one that is.

    Args:
        headers: of the request, names in any case as starlette's are.
        opened: it is for the page itself, which may be opened from a link on another website: it holds no data, and
            cannot be framed.
    """
    if headers.get("transfer-encoding") or headers.get("content-length", "0").strip() not in ("", "0"):
        return 413, "this address takes no body: send a plain GET"
    if is_foreign(headers.get("origin"), None, headers.get("host")):
        return 403, "pages of another origin may not read the live view: open /lsa on the server itself"
    site = headers.get("sec-fetch-site", "none")
    navigation = opened and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if site not in ("none", "same-origin") and not navigation:
        return 403, "pages of another site may not read the live view: open /lsa on the server itself"
    return None


def content_security_policy(page: str) -> str:
    """The policy of ``page``: its own script and style, by their hashes, and connections to its own server."""
    script, style = (_hashes(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
