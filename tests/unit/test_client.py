"""What a server saved, from its status; the statuses of real servers are read in ``tests/server/test_examples.py``."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_lsa.client import (
    NoServer,
    Savings,
    get_requests,
    get_status,
    last_stays,
    pool_bytes,
    savings,
    work,
)


def entry(rid: str, context: int, resident: int, prompt: int = 0, cached: int = 0) -> dict[str, Any]:
    pages = {"context_pages": context, "resident_pages": resident}
    return {"rid": rid, **pages, "prompt_tokens": prompt, "cached_tokens": cached}


def status(**overhead: int) -> dict[str, Any]:
    """999 virtual pages and the padding page; 1,000 bytes of KV in a page."""
    return {
        "page_bytes": 1000,
        "virtual": {"pages": 999},
        "physical": {"overhead_bytes": {"page_keys": 5000, **overhead}},
    }


def test_savings_add_up() -> None:
    shown = [entry("a", 40, 8, 2500, 64), entry("b", 60, 12, 3800, 2048), entry("other", 7, 7)]
    saved = savings(status(), last_stays(shown, ["a", "b"]))
    assert saved == Savings(2, 100, 20, 6300, 2112, 1000, 5.0)
    assert saved.full_bytes == 100_000
    assert saved.device_bytes == 20 * 1000 + 100 * 5
    assert saved.share == 0.205
    assert str(saved) == "20 of 100 pages resident: 0.0 MB on the device instead of 0.1 (20.5%)"


def test_savings_of_two_statuses() -> None:
    parts = entry("a", 40, 8, 2500, 64), entry("b", 60, 12, 3800, 2048)
    one, other = (savings(status(), [part]) for part in parts)
    assert one + other == Savings(2, 100, 20, 6300, 2112, 1000, 5.0)


def test_keys_of_an_indexer_count() -> None:
    assert savings(status(indexer=7000), [entry("a", 10, 10)]).device_bytes == 10 * 1000 + 10 * 12


def test_the_last_stay_of_a_retracted_request_counts() -> None:
    assert last_stays([entry("a", 10, 10), entry("a", 40, 8)], ["a"]) == [entry("a", 40, 8)]


def test_nothing_asked_saves_nothing() -> None:
    assert savings(status(), []).share == 1.0


def test_a_request_that_is_not_shown() -> None:
    with pytest.raises(ValueError, match="request 'b' is not among the 1 finished ones"):
        last_stays([entry("a", 1, 1)], ["a", "b"])


def counters(n: int) -> dict[str, Any]:
    return {
        "stores": {"pages": 10 * n, "bytes": 10_000 * n},
        "recalls": {"pages": 3 * n},
        "radix": {"prompt_tokens": 1000 * n, "hit_tokens": 250 * n},
    }


def test_work_between_two_statuses() -> None:
    done = work(counters(2), counters(5))
    assert (done.stored_pages, done.stored_bytes, done.recalled_pages) == (30, 30_000, 9)
    assert (done.prompt_tokens, done.hit_tokens, done.hit_share) == (3000, 750, 0.25)
    assert str(done).startswith("750 of 3,000 prompt tokens were found in the radix tree (25%); 30 pages")
    assert work(counters(2), counters(2)).hit_share == 0.0


def test_a_server_that_was_started_anew() -> None:
    with pytest.raises(ValueError, match="started anew"):
        work(counters(5), counters(2))


class Stranger(http.server.BaseHTTPRequestHandler):
    """Some other web server: knows one page, which is not ours."""

    def do_GET(self) -> None:
        known = {
            "/lsa/status": b"[]",
            "/lsa/requests": b"{}",
            "/lsa/requests?rid=a%2Fb%26c": b'{"finished": [{"rid": "a/b&c"}]}',
            "/server_info": b'{"version": "1"}',
            "/html/lsa/status": b"<html>",
        }
        body = known.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "is not what a server with LSA says"),
        ("/elsewhere", "answers HTTP 404, so this is no server with LSA: start one with"),
        ("/html", "no server answers at .* start one with: python -m sglang_lsa.launch_server"),
    ],
)
def test_somebody_else_answers(stranger: str, path: str, problem: str) -> None:
    with pytest.raises(NoServer, match=problem):
        get_status(stranger + path)


def test_requests_that_are_not_told(stranger: str) -> None:
    with pytest.raises(NoServer, match="/lsa/requests is not what a server with LSA says"):
        get_requests(stranger)


def test_a_name_of_any_characters(stranger: str) -> None:
    assert get_requests(stranger, "a/b&c")["finished"] == [{"rid": "a/b&c"}]


def test_a_pool_that_is_not_told(stranger: str) -> None:
    with pytest.raises(NoServer, match="does not say how large its KV pool is"):
        pool_bytes(stranger)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:30000", "nowhere"])
def test_nobody_answers(url: str) -> None:
    with pytest.raises(NoServer, match=f"no server answers at {url} .*: start one with"):
        get_status(url)
