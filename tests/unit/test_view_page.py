"""The page of the live view, as a file: it needs nothing else, and knows what a snapshot says."""

from __future__ import annotations

import base64
import hashlib
import re

from sglang_lsa.engine.groups import MOST_GROUPS
from sglang_lsa.serve.view import snapshot as snapshot_module
from sglang_lsa.serve.view import tree as tree_module
from sglang_lsa.serve.view.guard import content_security_policy
from sglang_lsa.serve.view.routes import PAGE
from sglang_lsa.serve.view.snapshot import (
    ARRIVING,
    CACHED,
    HOST,
    RECALLED,
    RESIDENT,
    SINK,
)


def test_the_page_is_one_file_that_its_policy_allows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    policy = content_security_policy(text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(re.findall(r"<script\b", text)) == len(re.findall(r"<style\b", text)) == 1
    for rule in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "form-action 'none'"):
        assert rule in policy
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", text), "nothing is loaded from elsewhere"
    assert not re.search(r"\bon\w+=\"|style=\"", text), "the policy forbids inline handlers and styles"
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage", "cookie"):
        assert word not in text


def test_the_page_knows_the_states_of_the_snapshot() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"SHARES = {snapshot_module.SHARES};" in text
    assert 'COLOURS = ["host", "cached", "arriving", "resident", "recalled", "sink"]' in text
    assert (HOST, CACHED, ARRIVING, RESIDENT, RECALLED, SINK) == (0, 1, 2, 3, 4, 5)
    assert len(re.findall(r'LETTERS = "([A-Z]+)"', text)[0]) == MOST_GROUPS, "one for each group"
    assert tree_module.FIELDS == ("parent", "pages", "readers", "heat", "device_pages", "host_pages")
    assert "nodes.map(([parent, pages, readers, heat, device, host])" in text
