"""``/lsa`` and ``/lsa/events`` of real servers: what they show of real requests, and whom they refuse."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from prompts import needle
from serving import flush, generate, is_busy, wait_until_idle

from sglang_lsa.serve.view.events import MOST_STREAMS
from sglang_lsa.serve.view.routes import PAGE
from sglang_lsa.server_process import ServerProcess
from sglang_lsa.streaming import event_of

pytestmark = pytest.mark.server


@contextlib.contextmanager
def answer(
    server: ServerProcess, path: str, headers: dict[str, str] | None = None, method: str = "GET", body: Any = None
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    # The path goes out as it is: urllib and browsers would resolve ``..`` themselves.
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    try:
        yield response
    finally:
        response.close()
        connection.close()


def status_of(server: ServerProcess, path: str, headers: dict[str, str] | None = None, **how: Any) -> int:
    with answer(server, path, headers, **how) as response:
        return response.status


def frames(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Events as they come."""
    while line := response.readline():
        if (event := event_of(line)) is not None:
            yield event


@pytest.fixture
def unchanged(lsa: ServerProcess) -> Iterator[None]:
    """Nothing that the server holds or counts is another after the test."""
    before = wait_until_idle(lsa)
    yield
    after = wait_until_idle(lsa)
    for name in (
        "config",
        "virtual",
        "physical",
        "host",
        "recalls",
        "failures",
        "refreshes",
        "evictions",
        "finished_requests",
    ):
        assert after[name] == before[name], name


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_the_page(lsa: ServerProcess, unchanged: None) -> None:
    with answer(lsa, "/lsa") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.read() == PAGE.read_bytes()


def test_an_idle_server(lsa: ServerProcess) -> None:
    flush(lsa)
    with answer(lsa, "/lsa/events") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        frame = next(frames(response))
    assert frame["requests"] == [] and frame["more_requests"] == 0
    assert frame["tree"] == {"nodes": [], "more": 0}
    assert frame["values"]["device_pages"] == 150
    assert frame["values"]["device_pages_held"] == frame["values"]["host_pages"] == 0


def test_running_requests(lsa: ServerProcess) -> None:
    """Three requests over one text: maps agree with their numbers, windows go on, the tree has what they share."""
    flush(lsa)
    texts = [needle(2500, 0.5, 3).prompt + f" Question {number}." for number in range(3)]
    with answer(lsa, "/lsa/events") as response, ThreadPoolExecutor(3) as pool:
        running = [pool.submit(generate, lsa, text, 150, f"view-{number}") for number, text in enumerate(texts)]
        seen = []
        for frame in frames(response):
            seen.append(frame)
            if all(future.done() for future in running):
                break
    together = [frame for frame in seen if len(frame["requests"]) == 3]
    decoding = [
        frame for frame in together if all(r["window"] >= 1 and r["policy"] == "quest" for r in frame["requests"])
    ]
    assert decoding, [[(r["rid"], r["window"]) for r in frame["requests"]] for frame in seen]
    for frame in decoding:
        assert {r["rid"] for r in frame["requests"]} == {"view-0", "view-1", "view-2"}
        for request in frame["requests"]:
            assert request["column"] == 1 and len(request["map"]) == request["pages"]
            assert request["map"][0] == "P", "the sink page"
            read = sum(character >= "3" for character in request["map"])
            assert read == request["resident"] < request["pages"]
            assert request["map"].count("F") == request["recalled"]
            assert request["budget"] >= request["resident"] - 4  # the tail grows by the page
    assert decoding[-1]["requests"][0]["tokens"] > decoding[0]["requests"][0]["tokens"]
    shared = max((node for frame in decoding for node in frame["tree"]["nodes"]), key=lambda node: node[2])
    parent, pages, readers, heat, device, host = shared
    assert (parent, readers) == (-1, 3) and pages > 30
    assert heat > 0 and 0 < device <= pages and 0 < host <= pages
    assert all(b["time"] - a["time"] > 0.9 for a, b in pairwise(seen)), "one a second at most"


def test_every_page_gets_the_same_poll(lsa: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        readers = [frames(stack.enter_context(answer(lsa, "/lsa/events"))) for _ in range(4)]
        first = [next(reader) for reader in readers]
        second = [next(reader) for reader in readers]
    assert len({frame["time"] for frame in second}) == 1
    assert second[0]["time"] > first[0]["time"]


def test_streams_are_limited_and_closed_ones_make_room(lsa: ServerProcess, unchanged: None) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_STREAMS):
            assert stack.enter_context(answer(lsa, "/lsa/events")).status == 200
        with answer(lsa, "/lsa/events") as response:
            assert response.status == 503
            assert "the most there may be: close one" in json.load(response)["error"]
        assert status_of(lsa, "/lsa") == 200
    for _ in range(100):  # the server notices at its next event at the latest
        if status_of(lsa, "/lsa/events") == 200:
            return
        time.sleep(0.1)
    raise AssertionError("streams that were closed are still counted")


def test_a_page_that_does_not_read_holds_up_nobody(lsa: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", lsa.port)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.sendall(b"GET /lsa/events HTTP/1.1\r\nHost: x\r\n\r\n")
        with answer(lsa, "/lsa/events") as response:
            times = [frame["time"] for frame, _ in zip(frames(response), range(3), strict=False)]
        assert generate(lsa, "Hello", tokens=4)["meta_info"]["completion_tokens"] == 4
    assert times == sorted(set(times))


def test_status_is_what_it_was(lsa: ServerProcess) -> None:
    """The view asks with SGLang's own request for internal state; the others are still answered."""
    with answer(lsa, "/lsa/events") as response:
        next(frames(response))
        assert lsa.get("/lsa/status")["physical"]["pages"] == 150
        state = lsa.get("/server_info")["internal_states"][0]
        assert state["lsa"]["physical"]["pages"] == 150 and "memory_usage" in state


# --- who is refused --------------------------------------------------------------------------------------------------

ADDRESSES = ("/lsa", "/lsa/events")
TRAVERSALS = (
    "/lsa/../../../../etc/passwd",
    "/lsa/..%2f..%2f..%2fetc/passwd",
    "/lsa/%2e%2e/%2e%2e/etc/passwd",
    "/lsa/events/../../../etc/passwd",
    "/lsa/page.html",
    "/lsa/view/page.html",
    "/lsa/\\..\\..\\etc\\passwd",
    "//etc/passwd",
)


@pytest.mark.parametrize("path", TRAVERSALS)
def test_paths_lead_nowhere(lsa: ServerProcess, unchanged: None, path: str) -> None:
    with answer(lsa, path) as response:
        assert response.status == 404
        assert b"root:" not in response.read()


@pytest.mark.parametrize("path", ADDRESSES)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_other_methods_are_refused(lsa: ServerProcess, unchanged: None, path: str, method: str) -> None:
    assert status_of(lsa, path, method=method, body=b'{"budget": 0.5}') == 405


@pytest.mark.parametrize("path", ADDRESSES)
@pytest.mark.parametrize("body", [b'{"budget":', b'{"budget": 0.5}', b"x" * 4_000_000], ids=["bad", "json", "large"])
def test_bodies_are_refused(lsa: ServerProcess, unchanged: None, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    try:
        assert status_of(lsa, path, headers, body=body) == 413
    except (BrokenPipeError, ConnectionResetError):
        assert len(body) > 1_000_000, "refused before all of it was sent"


@pytest.mark.parametrize("path", ADDRESSES)
def test_a_body_of_unknown_size_is_refused(lsa: ServerProcess, unchanged: None, path: str) -> None:
    assert status_of(lsa, path, body=iter([b"x" * 1000] * 3)) == 413


@pytest.mark.parametrize("path", ADDRESSES)
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=["origin", "file", "fetch", "frame", "other port"],
)
def test_other_origins_are_refused(lsa: ServerProcess, unchanged: None, path: str, headers: dict[str, str]) -> None:
    """Also though SGLang itself allows every origin to read its answers."""
    with answer(lsa, path, headers) as response:
        assert response.status == 403
        assert list(json.load(response)) == ["error"]


@pytest.mark.parametrize("path", ["/lsa/status", "/lsa/requests", "/lsa/requests?rid=somebody"])
@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_what_is_known_of_requests_is_for_no_other_site(lsa: ServerProcess, path: str, headers: dict[str, str]) -> None:
    with answer(lsa, path, headers) as response:
        assert response.status == 403
        assert "use a page of this server" in response.read().decode()
    assert status_of(lsa, path, {"Origin": lsa.url, "Sec-Fetch-Site": "same-origin"}) == 200


def test_its_own_origin_is_answered(lsa: ServerProcess) -> None:
    assert status_of(lsa, "/lsa/events", {"Origin": lsa.url, "Sec-Fetch-Site": "same-origin"}) == 200


@pytest.mark.parametrize("path", ADDRESSES)
def test_off_by_flag(small: ServerProcess, path: str) -> None:
    with answer(small, path) as response:
        assert response.status == 404
        assert "without --lsa-disable-view" in json.load(response)["error"]
    assert not is_busy(small)


@pytest.mark.parametrize("path", [*ADDRESSES, "/lsa/status", "/lsa/requests", "/lsa/requests?rid=a"])
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Basic OnNlY3JldA=="}],
    ids=["none", "wrong", "bare", "basic"],
)
def test_without_the_key(keyed: ServerProcess, path: str, headers: dict[str, str]) -> None:
    with answer(keyed, path, headers) as response:
        assert response.status == 401
        assert json.load(response) == {"error": "Unauthorized"}


@pytest.mark.parametrize("path", [path + "?api_key=secret&key=secret" for path in ADDRESSES])
def test_the_key_does_not_belong_in_the_address(keyed: ServerProcess, path: str) -> None:
    assert status_of(keyed, path) == 401


def test_with_the_key(keyed: ServerProcess) -> None:
    key = {"Authorization": "Bearer secret"}
    assert status_of(keyed, "/lsa", key) == 200
    with answer(keyed, "/lsa/events", key) as response:
        assert response.status == 200
        assert next(frames(response))["requests"] == []
    assert status_of(keyed, "/lsa/events", {**key, "Origin": "http://evil.example"}) == 403
