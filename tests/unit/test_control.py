"""Changes to the configuration of a running server: what is refused, and that nothing keeps the old one."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from release import MadeUp

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.config.kinds import FLAG, flag_of
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.patches.requests import choose, judge, options_of
from sglang_lsa.serve.control import (
    CHANGEABLE,
    MAX_BYTES,
    OF_A_REQUEST,
    OF_A_SET,
    changed,
    check_changes,
    is_foreign,
    parse_changes,
)
from sglang_lsa.serve.metrics import measure
from sglang_lsa.serve.status import status

# --- what is asked ---------------------------------------------------------------------------------------------------

BAD_BODIES = {
    "nothing": (b"", "the body is not JSON"),
    "malformed": (b'{"budget": 0.2', "the body is not JSON"),
    "no_utf8": (b'{"policy": "\xff"}', "the body is not JSON"),
    "utf16": ('{"budget": 0.2}'.encode("utf-16"), "the body is not JSON"),
    "nan": (b'{"budget": NaN}', "NaN is no number of JSON"),
    "infinity": (b'{"threshold": -Infinity}', "-Infinity is no number of JSON"),
    "too_deep": (b"[" * MAX_BYTES, "the body is not JSON"),
    "too_many_digits": (b'{"budget": ' + b"1" * 5000 + b"}", "the body is not JSON"),
    "key_twice": (b'{"budget": 0.2, "budget": 0.3}', "the key 'budget' is there twice"),
    "array": (b"[0.2]", "the body is [0.2]: send an object with one or more of policy, budget"),
    "number": (b"0.2", "the body is 0.2: send an object"),
    "null": (b"null", "the body is None: send an object"),
    "empty": (b"{}", "the body is {}: send an object"),
    "unknown_key": (
        b'{"buget": 0.2}',
        "unknown key 'buget': use one or more of policy, budget, prefill, dense_steps, prompt_lookup, widen",
    ),
    "odd_key": (b'{"\\ud800": 0.2}', "unknown key '\\ud800'"),
    "budget_text": (b'{"budget": "0.2"}', "POST /lsa/config: budget is '0.2': use a number in (0, 1], or auto"),
    "budget_true": (b'{"budget": true}', "budget is True: use a value of type float"),
    "budget_null": (b'{"budget": null}', "budget is None: use a value of type float"),
    "budget_list": (b'{"budget": [0.2]}', "budget is [0.2]: use a plain value"),
    "budget_huge": (b'{"budget": 1e999}', "budget is inf: use a finite number"),
    "threshold_huge": (b'{"threshold": 1e999}', "threshold is inf: use a finite number"),
    "threshold_long": (b'{"threshold": -1' + b"0" * 400 + b"}", "use a finite number"),
    "policy_unknown": (b'{"policy": "oracle"}', "policy is 'oracle': use one of indexer, retriever, quest, native, "),
    "policy_number": (b'{"policy": 3}', "policy is 3: use a value of type str"),
    "policy_odd": (b'{"policy": "\\ud800"}', "policy is '\\ud800': use one of"),
    "prefill_unknown": (b'{"prefill": "lazy"}', "prefill is 'lazy': use one of exact, resident"),
    "prefill_null": (b'{"prefill": null}', "prefill is None: use a value of type str"),
}


@pytest.mark.parametrize(("body", "words"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_bodies_are_refused(body: bytes, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_changes(body)
    assert words in str(refused.value)
    assert len(str(refused.value)) < 400, "what was sent is not sent back"
    str(refused.value).encode()


FLAGS = [field.name for field in dataclasses.fields(LSAConfig) if field.metadata["kind"] == FLAG]


@pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(LSAConfig)} - set(CHANGEABLE)))
def test_what_a_running_server_cannot_change(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} cannot change while the server runs: ") as refused:
        check_changes({name: getattr(LSAConfig(), name)})
    flags = set(re.findall(r"--lsa-[a-z-]+", str(refused.value)))
    assert flags <= {"--lsa-config", *map(flag_of, FLAGS)}
    assert (flag_of(name) in flags) == (name in FLAGS)


def test_good_bodies() -> None:
    body = b'{"budget": 1, "threshold": null, "policy": "recency", "fallback_budget": 1.0, "min_coverage": 0}'
    values = parse_changes(body)
    assert values == {
        "budget": 1.0,
        "threshold": None,
        "policy": "recency",
        "fallback_budget": 1.0,
        "min_coverage": 0.0,
    }
    assert isinstance(values["budget"], float)
    assert parse_changes(b' {"prefill": "resident"}\n') == {"prefill": "resident"}


IMPOSSIBLE = {
    "budget_zero": ({"budget": 0.0}, "budget 0.0 is out of range: use a number in (0, 1]"),
    "budget_above_one": ({"budget": 1.1}, "budget 1.1 is out of range"),
    "min_coverage": ({"min_coverage": -0.1}, "min_coverage -0.1 is out of range: use a share in [0, 1]"),
    "indexer_without_one": ({"policy": "indexer"}, "--lsa-policy indexer needs a trained checkpoint"),
    "fallback_below_budget": ({"fallback_budget": 0.1}, "fallback_budget 0.1 is below --lsa-budget 0.135"),
    "one_of_two": ({"budget": 0.3, "min_coverage": 7.0}, "min_coverage 7.0 is out of range"),
    "smuggled": ({"debug": True}, "debug cannot change"),
}


@pytest.mark.parametrize(("values", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_configurations_change_nothing(values: dict[str, Any], words: str) -> None:
    runtime = make_runtime()
    before = runtime.config
    with pytest.raises(ValueError) as refused:
        runtime.reconfigure(values)
    assert words in str(refused.value)
    assert runtime.config is before
    assert (runtime.config_changes, runtime.config_changed_at) == (0, None)


def test_what_is_not_named_stays() -> None:
    config = LSAConfig(window=8, prefetch_steps=3, observe_layers=(1, 2), indexer="somewhere", min_pages=3)
    after = changed(config, {"budget": 0.2, "policy": "quest"})
    assert after == dataclasses.replace(config, budget=0.2, policy="quest")
    assert changed(after, {"policy": None}).policy == "indexer", "null is the default, as at start"
    assert changed(LSAConfig(budget=0.2, fallback_budget=0.2), {"budget": 0.4, "fallback_budget": None}).budget == 0.4


# --- from where ------------------------------------------------------------------------------------------------------

ORIGINS = [
    # Origin, Sec-Fetch-Site, Host
    pytest.param(None, None, "127.0.0.1:30000", False, id="a program"),
    pytest.param(None, None, None, False, id="a program without a host"),
    pytest.param("http://127.0.0.1:30000", "same-origin", "127.0.0.1:30000", False, id="a page of this server"),
    pytest.param("http://Server.example", None, "server.EXAMPLE:80", False, id="the default port"),
    pytest.param("https://server.example:443", None, "server.example", False, id="the default port of https"),
    pytest.param("http://[::1]:30000", None, "[::1]:30000", False, id="IPv6"),
    pytest.param(None, "none", "127.0.0.1:30000", False, id="typed by the user"),
    pytest.param("https://evil.example", None, "127.0.0.1:30000", True, id="another host"),
    pytest.param("http://127.0.0.1:8080", None, "127.0.0.1:30000", True, id="another port"),
    pytest.param("https://server.example", None, "server.example:80", True, id="another scheme's port"),
    pytest.param("http://127.0.0.1.evil.example:30000", None, "127.0.0.1:30000", True, id="a longer name"),
    pytest.param("http://127.0.0.1:30000@evil.example", None, "127.0.0.1:30000", True, id="a user name"),
    pytest.param("null", None, "127.0.0.1:30000", True, id="a sandbox"),
    pytest.param("", None, "127.0.0.1:30000", True, id="empty"),
    pytest.param("file://", None, "127.0.0.1:30000", True, id="a file"),
    pytest.param("http://127.0.0.1:x", None, "127.0.0.1:30000", True, id="no port"),
    pytest.param("http://127.0.0.1:30000", None, None, True, id="no host to compare with"),
    pytest.param(None, "cross-site", "127.0.0.1:30000", True, id="cross-site without an origin"),
    pytest.param(None, "same-site", "127.0.0.1:30000", True, id="another port of the same host"),
    pytest.param(
        "http://127.0.0.1:30000", "Cross-Site", "127.0.0.1:30000", True, id="cross-site with a fitting origin"
    ),
]


@pytest.mark.parametrize(("origin", "site", "host", "foreign"), ORIGINS)
def test_pages_of_other_sites(origin: str | None, site: str | None, host: str | None, foreign: bool) -> None:
    assert is_foreign(origin, site, host) is foreign


# What SGLang does before the route is asked: by the server's keys (API key, admin key) and the key in the request.
LOCKS = {
    (None, None): {None: True, "api": True, "admin": True, "wrong": True},
    ("api", None): {None: False, "api": True, "admin": False, "wrong": False},
    (None, "admin"): {None: False, "api": False, "admin": True, "wrong": False},
    ("api", "admin"): {None: False, "api": False, "admin": True, "wrong": False},
}


@pytest.mark.parametrize(("api_key", "admin_key"), LOCKS)
def test_keys(api_key: str | None, admin_key: str | None) -> None:
    """SGLang's own lock, in front of the real route. Who gets past it is told that a body without a type is none."""
    from fastapi import FastAPI
    from sglang.srt.utils.auth import add_api_key_middleware
    from starlette.testclient import TestClient

    from sglang_lsa.patches.control_route import add_control_route

    app = FastAPI()
    add_control_route(app)
    if api_key or admin_key:
        add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_key)
    client = TestClient(app)
    for key, passes in LOCKS[api_key, admin_key].items():
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert client.post("/lsa/config", headers=headers).status_code == (415 if passes else 401), key


# --- one owner -------------------------------------------------------------------------------------------------------


def make_runtime(**options: Any) -> LSARuntime:
    keys, values = ([torch.zeros(41 * PAGE_SIZE, 1, 2)] for _ in range(2))
    pager = Pager(MhaLayout(keys, values, PAGE_SIZE), 64)
    table = torch.zeros((9, 20 * PAGE_SIZE), dtype=torch.int32)
    return LSARuntime(LSAConfig(**options), pager, table, 2, 1.0, chunk_tokens=4 * PAGE_SIZE)


def configurations(root: Any) -> Iterator[tuple[str, LSAConfig]]:
    """Every configuration that can be reached from ``root`` through objects of this project and plain containers."""
    todo, seen = [("runtime", root)], set()
    while todo:
        path, value = todo.pop()
        if isinstance(value, LSAConfig):
            yield path, value
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                todo += [(f"{path}[{key!r}]", item) for key, item in value.items()]
            elif isinstance(value, list | tuple | set):
                todo += [(f"{path}[{index}]", item) for index, item in enumerate(value)]
            elif callable(value) and getattr(value, "__closure__", None):
                todo += [(f"{path} closure", cell.cell_contents) for cell in value.__closure__]
            elif type(value).__module__.startswith("sglang_lsa"):
                todo += [(f"{path}.{name}", item) for name, item in vars(value).items()]


def test_no_part_keeps_a_stale_configuration() -> None:
    """There is one, wherever one looks for it, and it is the new one."""
    runtime = make_runtime(min_context=4096)
    (owned,) = (config for _, config in configurations(runtime))
    assert owned is runtime.config
    runtime.reconfigure({"budget": 0.4, "threshold": 0.1, "policy": "recency"})
    ((path, owned),) = configurations(runtime)
    assert owned is runtime.config, f"{path} has another"
    assert runtime.config.budget == 0.4
    assert runtime.config.min_context == 20 * PAGE_SIZE, "what was made fit at start stays so"
    assert runtime.admission.config is runtime.prefill.config is runtime.config


def test_auto_is_refused_on_a_server_that_cannot() -> None:
    runtime = make_runtime()
    with pytest.raises(ValueError, match="auto does not go with the policy quest"):
        runtime.reconfigure({"budget": "auto"})
    runtime.lookahead.rules.config = LSAConfig(indexer="x")
    runtime.lookahead.rules.thresholds = {"indexer": 0.0}
    with pytest.raises(ValueError, match="has no expectation: add it with sglang-lsa calibrate"):
        runtime.reconfigure({"budget": "auto"})
    known = Expectation(((0.0, 0.0, 0.0), (1.0, 1.0, 0.05)), "a test")
    runtime.lookahead.rules.expectations = {"indexer": known}
    runtime.reconfigure({"budget": "auto", "max_budget": 0.4})
    assert runtime.config.auto and status(runtime)["budget"] == "auto" and measure(runtime)["lsa_budget"] == 0.4
    with pytest.raises(ValueError, match="auto does not go with the policy quest"):
        runtime.reconfigure({"policy": "quest"})
    runtime.reconfigure({"policy": "quest", "budget": 0.2})


def test_a_change_is_shown_and_counted() -> None:
    runtime = make_runtime()
    assert status(runtime)["config_changed_at"] is None
    runtime.reconfigure({"budget": 0.4})
    runtime.reconfigure({"policy": "random"})
    shown = status(runtime)
    assert (shown["budget"], shown["policy"], shown["config_changes"]) == (0.4, "random", 2)
    assert shown["config"] == dataclasses.asdict(runtime.config)
    assert shown["config_changed_at"] > 1.7e9
    assert (measure(runtime)["lsa_budget"], measure(runtime)["lsa_config_changes"]) == (0.4, 2)
    json.dumps(shown)


@pytest.mark.parametrize("name", CHANGEABLE)
def test_what_is_in_force_already_is_no_change(name: str, caplog: pytest.LogCaptureFixture) -> None:
    runtime = make_runtime()
    value = getattr(runtime.config, name)
    with caplog.at_level(logging.INFO, logger="sglang_lsa"):
        runtime.reconfigure({name: value})
        runtime.reconfigure({"policy": None})  # the default, which is in force
    assert "changed" not in caplog.text
    assert (runtime.config_changes, runtime.config_changed_at) == (0, None)


def test_what_changes_is_logged_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    runtime = make_runtime()
    with caplog.at_level(logging.INFO, logger="sglang_lsa"):
        runtime.reconfigure({"threshold": None, "budget": 0.4, "policy": "quest"})
    (line,) = [record.getMessage() for record in caplog.records if "changed" in record.getMessage()]
    assert line == "LSA: budget changed from 0.135 to 0.4" and runtime.config_changes == 1


# --- whom it reaches -------------------------------------------------------------------------------------------------


def arrive(runtime: LSARuntime, tokens: int, **lsa: object) -> SimpleNamespace:
    parameters = SimpleNamespace(custom_params={"lsa": lsa} if lsa else None, max_new_tokens=10_000)
    req = MadeUp(
        rid="a",
        origin_input_ids=[7] * tokens,
        full_untruncated_fill_ids=[7] * tokens,
        prefix_indices=torch.zeros(0, dtype=torch.int64),
        sampling_params=parameters,
    )
    req.refusal = judge(runtime.admission, req)
    return req


@pytest.mark.parametrize("change", [{"policy": "full"}, {"budget": 1.0}], ids=str)
def test_a_prompt_that_waits_does_not_become_impossible(change: dict[str, Any]) -> None:
    """It is larger than the device pool: had it to be read whole now, it would wait for ever."""
    runtime = make_runtime(min_context=256)
    req = arrive(runtime, 60 * PAGE_SIZE)
    assert req.refusal is None
    runtime.reconfigure(change)
    admitted = choose(runtime.admission, req, 0, [], 4 * PAGE_SIZE)
    assert admitted is not None and admitted.how == "streamed"
    assert arrive(runtime, 60 * PAGE_SIZE).refusal is not None, "the next one is told"
    assert arrive(runtime, 60 * PAGE_SIZE, policy="quest", budget=0.1).refusal is None


@pytest.mark.parametrize("named", [{}, {"budget": 0.2}, {"policy": "random"}], ids=str)
def test_a_request_keeps_what_held_when_it_arrived(named: dict[str, Any]) -> None:
    """Also after a retraction: admission sees the same request again."""
    runtime = make_runtime(budget=0.3, policy="recency")
    req = arrive(runtime, 100, **named)
    runtime.reconfigure({"budget": 0.9, "policy": "quest", "prefill": "resident"})
    options = options_of(runtime.admission, req)
    assert (options.budget, options.policy, options.prefill) == (
        named.get("budget", 0.3),
        named.get("policy", "recency"),
        "exact",
    )
    late = options_of(runtime.admission, arrive(runtime, 100, **named))
    assert (late.budget, late.policy, late.prefill) == (
        named.get("budget", 0.9),
        named.get("policy", "quest"),
        "resident",
    )


def test_every_field_that_may_change_is_either_of_a_request_or_of_a_set() -> None:
    assert not set(OF_A_REQUEST) & set(OF_A_SET)
    assert set(CHANGEABLE) <= {field.name for field in dataclasses.fields(LSAConfig)}
