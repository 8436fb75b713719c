"""What is told of single requests: bounded, nothing formatted before somebody asks, and then not in the scheduler."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.testclient import TestClient
from sglang.srt.managers import io_struct

from sglang_lsa.config import PAGE_SIZE, GivenSet, LSAConfig
from sglang_lsa.engine.groups import GroupRules
from sglang_lsa.engine.request import HISTORY_WINDOWS, Asked, Request, Residency, Window
from sglang_lsa.engine.runtime import FINISHED_REMEMBERED, LSARuntime
from sglang_lsa.engine.selection import Watched
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.patches.http_routes import add_status_routes, ask, together
from sglang_lsa.patches.own_pages import refuse_foreign
from sglang_lsa.patches.scheduler_init_request_dispatcher import tell
from sglang_lsa.serve.one_request import LONGEST_NAME, MOST_RUNNING, collect, formatted, overview
from sglang_lsa.serve.status import config_in_force, status
from sglang_lsa.serve.view.snapshot import snapshot


@pytest.fixture
def runtime() -> LSARuntime:
    keys, values = ([torch.zeros(41 * PAGE_SIZE, 1, 2)] for _ in range(2))
    return LSARuntime(
        LSAConfig(), Pager(MhaLayout(keys, values, PAGE_SIZE), 64), torch.zeros((9, 1280), dtype=torch.int32), 2, 1.0
    )


@pytest.fixture
def grouped() -> LSARuntime:
    """It forms any group that saves something."""
    keys, values = ([torch.zeros(41 * PAGE_SIZE, 1, 2)] for _ in range(2))
    pager = Pager(MhaLayout(keys, values, PAGE_SIZE), 64)
    table = torch.zeros((9, 1280), dtype=torch.int32)
    runtime = LSARuntime(LSAConfig(groups=True), pager, table, 2, 1.0)
    assert runtime.groups is not None
    runtime.groups.rules = GroupRules(least_saved=1e-9)
    return runtime


class Unread(np.ndarray):
    """Positions that may be kept, and not looked at."""

    def __array_finalize__(self, _: object) -> None:
        pass

    def tolist(self) -> Any:
        raise AssertionError("written out when the request ended")

    def __array_ufunc__(self, *_: object, **__: object) -> Any:
        raise AssertionError("computed with when the request ended")

    def __iter__(self) -> Any:
        raise AssertionError("gone through when the request ended")


def running(runtime: LSARuntime, rid: str, windows: int = 0, positions: np.ndarray | None = None) -> Request:
    request = Request(rid, 1, Asked("quest", 0.2), tokens=64 * 15 + 9, prompt_tokens=900, window=windows - 1)
    request.pages = np.arange(1, 17)
    request.resident.positions = np.array([0, 2]) if positions is None else positions
    request.resident.tail_start = 14
    seen = Watched(((3, 0.5, 7), (4, None, 9)), 0.25)
    for number in range(windows):
        request.story.windows.append(Window(14, request.resident.positions, 900 + number, seen if number % 2 else None))
    runtime.requests[rid] = request
    return request


def gone(runtime: LSARuntime, rid: str) -> None:
    runtime.request_gone(rid, complete=True)


def told(runtime: LSARuntime, rid: str) -> dict[str, Any]:
    """As it arrives: through JSON and back, so that all of it is plain."""
    return json.loads(json.dumps(formatted(collect(runtime, rid))))


# --- when a request ends ---------------------------------------------------------------------------------------------


def test_nothing_is_formatted_when_a_request_ends(runtime: LSARuntime) -> None:
    positions = np.arange(2109).view(Unread)
    running(runtime, "long", HISTORY_WINDOWS, positions)
    gone(runtime, "long")
    (kept,) = runtime.finished
    assert len(kept.windows) == HISTORY_WINDOWS
    assert all(window.positions is positions for window in kept.windows), "copied"


def test_what_is_remembered_is_bounded(runtime: LSARuntime) -> None:
    for number in range(FINISHED_REMEMBERED + 5):
        running(runtime, f"r{number}", 1)
        gone(runtime, f"r{number}")
    assert [entry["rid"] for entry in overview(runtime)["finished"]] == [
        f"r{n}" for n in range(5, FINISHED_REMEMBERED + 5)
    ]
    assert told(runtime, "r0")["finished"] == []
    assert status(runtime)["finished_requests"] == FINISHED_REMEMBERED + 5


# --- when somebody asks ----------------------------------------------------------------------------------------------


def test_everything_of_a_request(runtime: LSARuntime) -> None:
    running(runtime, "a", 3)
    (here,) = told(runtime, "a")["running"]
    assert here["resident"] == [1, 3, 15, 16]
    assert here["resident_pages"] == len(here["resident"])
    gone(runtime, "a")
    found = told(runtime, "a")
    assert found["running"] == [] and found["more_running"] == 0
    (entry,) = found["finished"]
    assert here["group"] is None, "the server forms no groups"
    gone_too = {"resident", "group"}
    assert entry == {name: value for name, value in here.items() if name not in gone_too} | {"number": 1}
    assert entry["history"] == [[0, 2]] * 3
    assert entry["sets"] == ";".join(str(GivenSet(900 + n, 14, (0, 2))) for n in range(3))
    assert entry["watched"] == [{"tokens": 901, "pages": [[3, 0.5, 7], [4, None, 9]], "lowest": 0.25}]


def test_the_bound_of_a_set_is_within_what_the_device_pool_is_meant_for(runtime: LSARuntime) -> None:
    """24 pages stay of a short context, but no set takes more than half of the pool's 40."""
    request = running(runtime, "a", 1)
    request.pages, request.resident.tail_start = np.arange(1, 31), 28
    (here,), (seen,) = told(runtime, "a")["running"], snapshot(runtime)["requests"]
    gone(runtime, "a")
    (after,) = told(runtime, "a")["finished"]
    assert here["budget_pages"] == seen["budget"] == after["budget_pages"] == 20


def test_a_window_that_no_step_has_read_is_no_set(runtime: LSARuntime) -> None:
    running(runtime, "a", 1).story.windows.append(Window(15, np.array([5]), 0, Watched((), None)))
    (entry,) = told(runtime, "a")["running"]
    assert entry["history"] == [[0, 2], [5]]
    assert entry["sets"] == "900:14:0,2"
    assert entry["watched"] == []


def test_all_stays_of_a_name_the_newest_last(runtime: LSARuntime) -> None:
    for _ in range(2):
        running(runtime, "a", 1)
        gone(runtime, "a")
        running(runtime, "b", 1)
        gone(runtime, "b")
    running(runtime, "a", 2)
    found = told(runtime, "a")
    assert [entry["number"] for entry in found["finished"]] == [1, 3]
    assert [entry["window"] for entry in found["running"]] == [1]
    assert told(runtime, "nobody") == {"finished": [], "running": [], "more_running": 0}


def test_the_overview_is_bounded(runtime: LSARuntime) -> None:
    name = "x" * 100_000
    for number in range(MOST_RUNNING + 7):
        running(runtime, f"{name}{number}", 5)
    for number in range(3):
        gone(runtime, f"{name}{number}")
    shown = overview(runtime)
    assert (len(shown["running"]), shown["more_running"], len(shown["finished"])) == (MOST_RUNNING, 4, 3)
    assert {len(entry["rid"]) for entry in (*shown["running"], *shown["finished"])} == {LONGEST_NAME}
    assert not {"sets", "history", "resident", "windows"} & set(shown["running"][0])
    assert len(json.dumps(shown)) < 256 * 1024


def test_the_status_is_bounded(runtime: LSARuntime) -> None:
    for number in range(300):
        running(runtime, "x" * 1000 + str(number), HISTORY_WINDOWS)
    running(runtime, "dense").resident.tail_start = 0
    shown = status(runtime)
    assert shown["running"] == {
        "requests": 301,
        "decoding": 300,
        "dense": 1,
        "context_pages": 301 * 16,
        "resident_pages": 300 * 4 + 18,
    }
    assert len(json.dumps(shown)) < 8192


# --- on the way ------------------------------------------------------------------------------------------------------


def test_schedulers_are_told_of_together(runtime: LSARuntime) -> None:
    running(runtime, "a", 1)
    one = collect(runtime, "a")
    gone(runtime, "a")
    both = together([one, collect(runtime, "a") | {"more_running": 2}])
    assert [len(both[name]) for name in ("finished", "running")] == [1, 1]
    assert both["more_running"] == 2
    assert both["running"][0]["sets"] == both["finished"][0]["sets"] == "900:14:0,2"


def test_a_scheduler_that_cannot_say() -> None:
    async def answer(message: Any) -> list[Any]:
        assert (message.requests, message.named) == (True, "a")
        return [SimpleNamespace(told={}, problem="the scheduler could not describe itself")]

    manager = SimpleNamespace(auto_create_handle_loop=lambda: None, lsa_status_communicator=answer)
    with pytest.raises(HTTPException, match="could not describe itself") as refused:
        asyncio.run(ask(manager, requests=True, named="a"))
    assert refused.value.status_code == 500


@pytest.fixture
def client(runtime: LSARuntime) -> TestClient:
    return http(runtime)


def http(runtime: LSARuntime) -> TestClient:
    """HTTP over the real messages and routes, and a scheduler that has this runtime; no process in between."""
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lsa=runtime)))

    async def communicate(message: Any) -> list[Any]:
        answer = tell(scheduler, io_struct._msgpack_decoder.decode(msgspec.msgpack.encode(message)))
        return [io_struct._msgpack_decoder.decode(msgspec.msgpack.encode(answer))]

    manager = SimpleNamespace(auto_create_handle_loop=lambda: None, lsa_status_communicator=communicate)
    app = FastAPI()
    add_status_routes(router := APIRouter(), lambda: manager)
    app.include_router(router)
    return TestClient(app, raise_server_exceptions=False)


def test_over_http(runtime: LSARuntime, client: TestClient) -> None:
    running(runtime, "a/b &c", 2)
    running(runtime, "other")
    assert client.get("/lsa/status").json() == json.loads(json.dumps(status(runtime)))
    assert client.get("/lsa/config").json() == json.loads(json.dumps(config_in_force(runtime)))
    answer = client.get("/lsa/requests", params={"rid": "a/b &c"})
    assert answer.json() == told(runtime, "a/b &c")
    assert answer.headers["cache-control"] == "no-store"
    assert client.get("/lsa/requests", params={"rid": ""}).json()["running"] == []
    assert client.get("/lsa/requests").json() == json.loads(json.dumps(overview(runtime)))
    for path in ("/lsa/status", "/lsa/config", "/lsa/requests", "/lsa/requests?rid=other"):
        assert client.get(path, headers={"Origin": "http://elsewhere"}).status_code == 403


def test_a_group_is_told_of_those_who_are_in_it(grouped: LSARuntime) -> None:
    """Three read pages 1 and 3 together; the third did not choose page 3 and is not told it did. One more reads all."""
    for number in range(3):
        running(grouped, f"r{number}", 1).row = number + 1
    grouped.requests["r2"].resident.positions = np.array([0, 5])
    running(grouped, "full", 1).resident = Residency()
    assert grouped.groups is not None
    grouped.groups.of(list(grouped.requests.values()))
    with http(grouped) as client:
        told = {entry["rid"]: entry for entry in client.get("/lsa/requests").json()["running"]}
        (alone,) = client.get("/lsa/requests", params={"rid": "r2"}).json()["running"]
        counts = client.get("/lsa/status").json()["groups"]
    shared = {"number": 0, "members": 3, "pages": 2}
    assert [told[f"r{number}"]["group"] for number in range(3)] == [
        shared | {"added_pages": 0, "own_pages": 2},
        shared | {"added_pages": 0, "own_pages": 2},
        shared | {"added_pages": 1, "own_pages": 3},
    ]
    assert alone["group"] == told["r2"]["group"]
    assert told["full"]["group"] is None
    for entry in told.values():
        if group := entry["group"]:
            assert entry["resident_pages"] == group["pages"] - group["added_pages"] + group["own_pages"]
    assert [counts[name] for name in ("now", "requests", "pages", "chosen_pages")] == [1, 3, 2, 5]


def test_who_comes_after_a_member_is_not_taken_for_it(grouped: LSARuntime) -> None:
    """Its name is given again before the next decode step."""
    for number in range(3):
        running(grouped, f"r{number}", 1).row = number + 1
    assert grouped.groups is not None
    grouped.groups.of(list(grouped.requests.values()))
    gone(grouped, "r1")
    assert [entry["group"]["members"] for entry in overview(grouped)["running"]] == [3, 3], "of the last decode step"
    running(grouped, "r1")
    assert {entry["rid"]: bool(entry["group"]) for entry in overview(grouped)["running"]} == {
        "r0": True,
        "r2": True,
        "r1": False,
    }
    for rid in ("r0", "r2"):
        gone(grouped, rid)
    assert overview(grouped)["running"][0]["group"] is None
    assert snapshot(grouped)["groups"] == [], "nobody of it is left"
    grouped.on_idle()
    assert grouped.groups.members() == []


def test_a_description_that_fails_costs_one_answer(
    runtime: LSARuntime, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    running(runtime, "a", 1).resident.positions = np.array([99])
    answer = client.get("/lsa/requests", params={"rid": "a"})
    assert answer.status_code == 500 and "the scheduler could not describe itself: IndexError" in answer.text
    assert "it goes on" in caplog.text
    assert client.get("/lsa/status").status_code == 200


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({}, False),
        ({"origin": "http://server:30000"}, False),
        ({"origin": "http://elsewhere"}, True),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "same-site"}, True),
        ({"origin": "null"}, True),
    ],
)
def test_pages_of_other_websites_are_told_nothing(headers: dict[str, str], foreign: bool) -> None:
    request: Any = SimpleNamespace(headers={"host": "server:30000", **headers})
    if not foreign:
        return refuse_foreign(request)
    with pytest.raises(HTTPException) as refused:
        refuse_foreign(request)
    assert refused.value.status_code == 403
