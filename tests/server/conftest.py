"""Real servers, shared by the tests that need them: one that begins anew takes most of a minute on two cores."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pytest
import torch
from ready_servers import ReadyServers
from serving import assert_idle
from soak import FLAGS, LSA_CONFIG, NARROW

from sglang_lsa import child_process
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.server_process import LSA, STOCK, ServerProcess

DEVICE_TOKENS = 9600
SERVED = ["--served-model-name", "smollm2", "--skip-server-warmup", "--enable-metrics", "--enable-cache-report"]
SIX_LAYERS = ["--dtype", "float32", "--json-model-override-args", '{"num_hidden_layers": 6}']
"""What shows where pages are and what is read needs no more of the model, and is rounded the same in any company."""


@pytest.fixture(scope="session", autouse=True)
def ready_servers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most servers need not import SGLang again; see ``ready_servers``."""
    if request.config.getoption("new_processes") or torch.cuda.is_available():
        yield
        return
    ready = ReadyServers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child_process, "begin", ready.begin)
        yield
    ready.stop()


@pytest.fixture(scope="session")
def model_path() -> str:
    return str(embedded_model_path())


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("logs")


def flags_of(model_path: str, host_memory_gb: float) -> list[str]:
    """A device pool of 150 pages, and a host mirror."""
    flags = ["--model-path", model_path, *SERVED, "--lsa-device-tokens", str(DEVICE_TOKENS)]
    flags += ["--lsa-host-memory-gb", str(host_memory_gb), "--lsa-min-context", "1024", *NARROW]
    return [*flags, "--lsa-debug", "--enable-custom-logit-processor"]


@pytest.fixture(scope="session")
def flags_of_lsa(model_path: str) -> list[str]:
    """What the server ``lsa`` is started with."""
    return [*flags_of(model_path, 0.44), *SIX_LAYERS]


@pytest.fixture(scope="session")
def lsa(flags_of_lsa: list[str], logs: pathlib.Path) -> Iterator[ServerProcess]:
    """LSA with a device pool of 150 pages and a host mirror of five times that; checks its ledger after every batch."""
    with ServerProcess(LSA, flags_of_lsa, logs / "lsa.log") as server:
        yield server.wait_until_ready()


@pytest.fixture(scope="session")
def whole(model_path: str, logs: pathlib.Path) -> Iterator[ServerProcess]:
    """The same pools with the whole model in bfloat16, for those who ask whether an answer is right."""
    with ServerProcess(LSA, flags_of(model_path, 1.1), logs / "whole.log") as server:
        yield server.wait_until_ready()


@pytest.fixture(scope="session")
def small(model_path: str, logs: pathlib.Path) -> Iterator[ServerProcess]:
    """32 pages on the device, seven times that on the host, float32, from SGLang's launcher; see ``soak``. No view."""
    config = logs / "lsa.json"
    config.write_text(json.dumps({**LSA_CONFIG, "debug": True, "disable_view": True}))
    flags = ["--model-path", model_path, "--served-model-name", "smollm2", *FLAGS, "--lsa-config", str(config)]
    with ServerProcess("sglang.launch_server", flags, logs / "small.log") as server:
        yield server.wait_until_ready()


@pytest.fixture(scope="session")
def keyed(model_path: str, logs: pathlib.Path) -> Iterator[ServerProcess]:
    """LSA behind an API key (``secret``) and an administrator's (``topsecret``)."""
    flags = ["--model-path", model_path, *SERVED, *SIX_LAYERS, "--api-key", "secret", "--admin-api-key", "topsecret"]
    flags += ["--lsa-device-tokens", "4096", "--lsa-host-memory-gb", "0.5", "--lsa-min-context", "1024", *NARROW]
    with ServerProcess(LSA, flags, logs / "keyed.log") as server:
        yield server.wait_until_ready()


@pytest.fixture(scope="session")
def stock(model_path: str, logs: pathlib.Path) -> Iterator[ServerProcess]:
    """SGLang as released, without any LSA flag, on the model of ``small``; its pool holds every prompt, and its chunks,
    too: for each chunk SGLang's attention for CPUs does the work of the whole prompt."""
    flags = ["--model-path", model_path, "--served-model-name", "smollm2", *FLAGS]
    flags += ["--max-total-tokens", "24000", "--chunked-prefill-size", "8192"]
    with ServerProcess(STOCK, flags, logs / "stock.log") as server:
        yield server.wait_until_ready()


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest, last_of: list[str]) -> Iterator[None]:
    """After every test the idle LSA servers hold no page for anybody, and never had to ask the device which ones.
    Servers that no later test needs end."""
    yield
    for name in {"lsa", "small", "whole"}.intersection(request.fixturenames):
        server = request.getfixturevalue(name)
        assert_idle(server)
        assert server.get("/lsa/status")["page_reads"] == 0
    for name in last_of:
        request.getfixturevalue(name).stop()
