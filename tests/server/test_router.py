"""Two servers behind SGLang's router: agents stay where their memory is, and a full device pool is seen as load."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from release import HERE
from serving import EXAMPLES, assert_idle, flush
from soak import FLAGS, LSA_CONFIG

from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("sglang_router") is None, reason="sglang-router is not here: sglang-lsa[router]"
    ),
]
AGENTS, TURNS = 4, 3


@pytest.fixture(scope="module")
def servers(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    """Two with 32 pages on the device and 221 on the host."""
    folder = tmp_path_factory.mktemp("router")
    config = folder / "lsa.json"
    config.write_text(json.dumps({**LSA_CONFIG, "debug": True}))
    flags = ["--model-path", model_path, *FLAGS, "--lsa-config", str(config)]
    with ServerProcess(LSA, flags, folder / "a.log") as a, ServerProcess(LSA, flags, folder / "b.log") as b:
        yield [a.wait_until_ready(), b.wait_until_ready()]


@pytest.fixture(scope="module")
def example() -> Any:
    """``examples/router.py`` as a module."""
    spec = importlib.util.spec_from_file_location("router_example", EXAMPLES / "router.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agents_stay_where_their_memory_is(servers: list[ServerProcess]) -> None:
    """As the example says, run as a user would."""
    command = [sys.executable, str(EXAMPLES / "router.py"), "--agents", str(AGENTS), "--turns", str(TURNS)]
    command += ["--tokens", "900", *(word for server in servers for word in ("--url", server.url))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    *agents, first, second = done.stdout.splitlines()
    used = set()
    for line in agents:
        turns = re.findall(r"(http\S+) had (\d+) of (\d+) tokens", line)
        assert len(turns) == TURNS, line
        assert len({url for url, _, _ in turns}) == 1, f"an agent went elsewhere: {line}"
        used.add(turns[0][0])
        assert int(turns[0][1]) < 64
        for _, cached, prompt in turns[1:]:
            assert int(cached) > int(prompt) - 3 * 64, f"computed again: {line}"
    assert used == {server.url for server in servers}
    for line, server in zip((first, second), servers, strict=True):
        assert re.match(rf"{server.url}: \d+ turns, \d+ of \d+ pages resident", line), line
        assert_idle(server)


@pytest.mark.skipif(HERE != "0.5.17", reason="this SGLang has no /get_load, which the router asks for")
def test_a_full_device_pool_is_seen_by_the_router(servers: list[ServerProcess], example: Any) -> None:
    """The same prompt takes 26 of 32 device pages of one server: nearly all of its load, an eighth of its tokens."""
    full, idle = servers
    flush(full)
    body = {
        "text": example.memory(9, 1650),
        "sampling_params": {"max_new_tokens": 120, "ignore_eos": True, "custom_params": {"lsa": {"policy": "full"}}},
    }
    most = 0
    with example.router([full.url, idle.url], "power_of_two", None) as url, ThreadPoolExecutor(1) as pool:
        running = pool.submit(full.post, "/generate", body)
        while not running.done():
            with urllib.request.urlopen(f"{url}/get_loads", timeout=60) as answer:
                loads = {worker["worker"]: worker["load"] for worker in json.load(answer)["workers"]}
            assert loads[idle.url] < 64
            most = max(most, loads[full.url])
        (load,) = full.get("/v1/loads")["loads"]
    pages = -(-(running.result()["meta_info"]["prompt_tokens"] + 120) // 64)
    assert most / load["max_total_num_tokens"] > pages / 32 - 0.1, (most, load)
    assert_idle(full)


def test_what_the_router_does_not_pass_on(servers: list[ServerProcess], example: Any) -> None:
    """Options of a request are lost in this release of the router: if that ends, the page that says so is wrong."""
    options = {"custom_params": {"lsa": {"policy": "full"}}}
    sent = {"text": example.memory(5, 900), "rid": "through", "sampling_params": {"max_new_tokens": 20, **options}}
    with example.router([servers[0].url], "round_robin", None) as url:
        request = urllib.request.Request(
            f"{url}/generate", json.dumps(sent).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=300).close()
    (entry,) = servers[0].get("/lsa/requests?rid=through")["finished"]
    assert entry["resident_pages"] < entry["context_pages"], "it was pruned as if it had asked for nothing"
