"""``POST /lsa/config``: whom a change reaches, and what is refused with nothing changed. One case, one test."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prompts import prose
from serving import finished_request, generate, running_requests, wait_until_idle

from sglang_lsa.serve.control import CHANGEABLE, MAX_BYTES
from sglang_lsa.server_process import ServerProcess

pytestmark = pytest.mark.server
JSON = {"Content-Type": "application/json"}


def ask(
    server: ServerProcess,
    body: Any = b"",
    headers: dict[str, str] = JSON,
    method: str = "POST",
    path: str = "/lsa/config",
) -> tuple[int, Any]:
    """Status and answer; the path and the headers are sent as they are. An iterator is sent in chunks of its items."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    connection.request(method, path, content, headers)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    try:
        return answer.status, json.loads(text)
    except ValueError:
        return answer.status, text


def in_force(server: ServerProcess) -> dict[str, Any]:
    status = server.get("/lsa/status")
    return {name: status[name] for name in ("config", "config_changes", "config_changed_at")}


@pytest.fixture
def server(lsa: ServerProcess) -> Iterator[ServerProcess]:
    """The shared server, with its own configuration again afterwards."""
    before = in_force(lsa)["config"]
    yield lsa
    assert ask(lsa, {name: before[name] for name in CHANGEABLE})[0] == 200
    assert in_force(lsa)["config"] == before


@pytest.fixture
def unchanged(lsa: ServerProcess) -> Iterator[ServerProcess]:
    """The shared server; nothing is different afterwards."""
    before = in_force(lsa)
    yield lsa
    assert in_force(lsa) == before


# --- effect ----------------------------------------------------------------------------------------------------------


def test_a_change_is_answered_with_what_is_in_force(server: ServerProcess) -> None:
    before = in_force(server)
    code, answer = ask(server, {"budget": 0.25, "threshold": 0.5})
    assert code == 200
    assert answer["config"] == before["config"] | {"budget": 0.25, "threshold": 0.5}
    assert answer["config_changes"] == before["config_changes"] + 1
    assert answer["config_changed_at"] > (before["config_changed_at"] or 0)
    assert in_force(server) == server.get("/lsa/config") == answer
    assert server.get("/lsa/status")["budget"] == 0.25
    assert ask(server, {"threshold": None}, JSON | {"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200
    assert in_force(server)["config"]["threshold"] is None
    assert "LSA: budget changed from 0.135 to 0.25" in server.log.read_text(errors="replace")


def test_answers_follow_the_policy(server: ServerProcess) -> None:
    """A request that asks for nothing is answered as one that asks for the policy in force."""
    prompt, policies = prose(1500, 44), ("full", "recency", "quest")
    asked = {policy: generate(server, prompt, 28, policy=policy)["text"] for policy in policies}
    assert asked["full"] != asked["recency"], "this prompt does not tell them apart"
    for policy in policies:
        assert ask(server, {"policy": policy})[0] == 200
        assert generate(server, prompt, 28, f"changed-to-{policy}")["text"] == asked[policy]
        seen = finished_request(server, f"changed-to-{policy}")
        assert seen["policy"] == policy
        assert (seen["resident_pages"] == seen["context_pages"]) == (policy == "full")


def test_a_running_request_keeps_its_budget_and_follows_the_threshold(server: ServerProcess) -> None:
    """And one that came later has the new budget. A threshold of 2 leaves out whatever the budget has room for."""
    tokens = 200
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, server, prose(1600, 31), tokens, "before")
        while not any(request["window"] >= 0 for request in running_requests(server)):
            assert not running.done()
        assert ask(server, {"budget": 0.8, "threshold": 2.0})[0] == 200
        assert not running.done()
        running.result()
    before = finished_request(server, "before")
    assert before["budget"] == 0.135
    sizes = [len(positions) for positions in before["history"]]
    assert sizes[0] > sizes[-1], "the windows after the change have first and last pages only"
    assert before["collapsed"] >= 1
    assert ask(server, {"threshold": None})[0] == 200
    generate(server, prose(1600, 31), 4, "after")
    generate(server, prose(1600, 31), 4, "named", budget=0.4)
    after, named = finished_request(server, "after"), finished_request(server, "named")
    assert (after["budget"], named["budget"]) == (0.8, 0.4)
    assert after["resident_pages"] > named["resident_pages"] > sizes[0]


def test_changes_at_the_same_time_come_one_after_the_other(server: ServerProcess) -> None:
    before = in_force(server)["config_changes"]
    budgets = [0.1 + i / 100 for i in range(12)]
    with ThreadPoolExecutor(len(budgets)) as pool:
        answers = list(pool.map(lambda budget: ask(server, {"budget": budget}), budgets))
    assert [code for code, _ in answers] == [200] * len(budgets)
    assert [answer["config"]["budget"] for _, answer in answers] == budgets, "each is told what it asked for"
    counts = sorted(answer["config_changes"] for _, answer in answers)
    assert counts == list(range(before + 1, before + 1 + len(budgets)))
    last = max((answer for _, answer in answers), key=lambda answer: answer["config_changes"])
    assert in_force(server) == last


# --- refused: nothing is changed -------------------------------------------------------------------------------------

BODIES: dict[str, tuple[Any, int, str]] = {
    "malformed_json": (b'{"budget": 0.2', 400, "the body is not JSON"),
    "no_body": (b"", 400, "the body is not JSON"),
    "nan": (b'{"budget": NaN}', 400, "NaN is no number of JSON"),
    "an_array": (b"[0.2]", 400, "send an object with one or more of policy, budget"),
    "nothing_asked": ({}, 400, "send an object"),
    "unknown_key": ({"buget": 0.2}, 400, "unknown key 'buget': use one or more of policy, budget"),
    "fixed_at_start": ({"window": 32}, 400, "window cannot change while the server runs: restart it with --lsa-window"),
    "wrong_type": ({"budget": "0.2"}, 400, "budget is '0.2': use a number in (0, 1], or auto"),
    "out_of_range": ({"budget": 1.5}, 400, "budget 1.5 is out of range: use a number in (0, 1]"),
    "infinite": (b'{"threshold": 1e999}', 400, "threshold is inf: use a finite number"),
    "unknown_policy": ({"policy": "oracle"}, 400, "policy is 'oracle': use one of indexer, retriever, quest"),
    "indexer_without_one": ({"policy": "indexer"}, 400, "needs a trained checkpoint: add --lsa-indexer PATH, or use"),
    "all_or_nothing": ({"budget": 0.2, "min_coverage": 2}, 400, "min_coverage 2.0 is out of range"),
    "contradiction": ({"fallback_budget": 0.01}, 400, "fallback_budget 0.01 is below --lsa-budget 0.135"),
    "too_large": (b'{"budget": 0.2}' + b" " * MAX_BYTES, 413, f"more than {MAX_BYTES} bytes"),
    "too_deep": (b"[" * MAX_BYTES, 400, "the body is not JSON"),
}


@pytest.mark.parametrize(("body", "code", "words"), BODIES.values(), ids=BODIES.keys())
def test_bodies(unchanged: ServerProcess, body: Any, code: int, words: str) -> None:
    seen, answer = ask(unchanged, body)
    assert seen == code, answer
    assert words in answer["message"]


def test_a_large_body_of_unknown_length(unchanged: ServerProcess) -> None:
    code, answer = ask(unchanged, (b" " * 1024 for _ in range(MAX_BYTES // 1024 + 1)))
    assert (code, answer["message"][:17]) == (413, "the body has more")


def test_a_large_body_is_not_waited_for(unchanged: ServerProcess) -> None:
    code, _ = ask(unchanged, b"{}", JSON | {"Content-Length": str(10**12)})
    assert code == 413


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"], ids=str
)
def test_content_types(unchanged: ServerProcess, kind: str | None) -> None:
    """Those that a browser sends to another site without asking are among them."""
    code, answer = ask(unchanged, {"budget": 0.2}, {} if kind is None else {"Content-Type": kind})
    assert (code, "send application/json" in answer["message"]) == (415, True)


FOREIGN = {
    "another_host": {"Origin": "https://evil.example"},
    "another_port": {"Origin": "http://127.0.0.1:1"},
    "a_sandbox": {"Origin": "null"},
    "cross_site": {"Sec-Fetch-Site": "cross-site"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN.keys())
def test_pages_of_other_sites(unchanged: ServerProcess, headers: dict[str, str]) -> None:
    code, answer = ask(unchanged, {"budget": 0.2}, JSON | headers)
    assert (code, "use a page of this server" in answer["message"]) == (403, True)


def test_pages_of_this_server(server: ServerProcess) -> None:
    headers = JSON | {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert ask(server, {"budget": 0.2}, headers)[0] == 200


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_methods(unchanged: ServerProcess, method: str) -> None:
    assert ask(unchanged, {"budget": 0.2}, method=method)[0] == 405


PATHS = (
    "/lsa/config/../config/../../etc/passwd",
    "/lsa/../lsa/config",
    "/lsa/config/%2e%2e/%2e%2e/etc/passwd",
    "/lsa/config%2f..%2f..%2fflush_cache",
    "/lsa/config/..%5c..%5cconfig",
    "//lsa/config",
    "/lsa/config%00",
)


@pytest.mark.parametrize("path", PATHS)
def test_paths(unchanged: ServerProcess, path: str) -> None:
    assert ask(unchanged, {"budget": 0.2}, path=path)[0] == 404


def test_sglangs_own_endpoint_is_no_way_around(unchanged: ServerProcess) -> None:
    code, answer = ask(unchanged, {"server_args": {"budget": 0.2, "lsa_budget": 0.2}}, path="/set_internal_state")
    assert (code, answer) == (200, [False])


KEYS = {
    "no_key": ({}, 401),
    "the_api_key": ({"Authorization": "Bearer secret"}, 401),
    "a_wrong_key": ({"Authorization": "Bearer topsecret2"}, 401),
    "another_scheme": ({"Authorization": "Basic topsecret"}, 401),
    "the_admin_key": ({"Authorization": "Bearer topsecret"}, 200),
}


@pytest.mark.parametrize(("headers", "code"), KEYS.values(), ids=KEYS.keys())
def test_keys(keyed: ServerProcess, headers: dict[str, str], code: int) -> None:
    """As for SGLang's own admin endpoints; the other combinations of keys are in ``tests/unit/test_control.py``."""
    reader = {"Authorization": "Bearer secret"}
    before = ask(keyed, b"", reader, "GET", "/lsa/status")[1]
    seen, answer = ask(keyed, {"budget": before["budget"] / 2}, JSON | headers)
    after = ask(keyed, b"", reader, "GET", "/lsa/status")[1]
    assert seen == ask(keyed, b"", headers, path="/flush_cache")[0] == code, answer
    changes = after["config_changes"] - before["config_changes"]
    assert (changes, after["budget"]) == ((1, before["budget"] / 2) if code == 200 else (0, before["budget"]))


def test_the_server_answers_as_before(unchanged: ServerProcess) -> None:
    """After all that was refused."""
    assert generate(unchanged, "Hello", tokens=2)["meta_info"]["completion_tokens"] == 2
    wait_until_idle(unchanged)
