"""Real servers on a real GPU: stock SGLang, and LSA with CUDA graphs, without, and with FlashAttention-3 alone. All of
them start at the same time."""

from __future__ import annotations

import os
import pathlib
import shlex
from collections.abc import Iterator

import pytest
import torch
from gpu_servers import AS_LSA_ATTENDS, NO_FLASH_ATTENTION, READY_SECONDS, SERVED, STOCK
from release import RELEASE

from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.server_process import LSA, ServerProcess

POOL_TOKENS = 24_000
WITH_LSA = ["--lsa-device-tokens", str(POOL_TOKENS), "--lsa-host-memory-gb", "4", "--lsa-min-context", "1024"]
WITH_LSA += ["--lsa-debug", "--enable-metrics", "--lsa-indexer", "smollm2-135m-instruct", "--lsa-policy", "quest"]
WITH_LSA += ["--lsa-config", '{"groups": false, "floor_tokens": 512, "widen": 1}']
"""Without groups, in which a request reads more than it chose: what it answers, and reads, is its own here. With them:
test_groups.py. Sets that are never widened, so that a batch of dense requests can be too large for CUDA graphs: these
have room for what 256 requests may read, which is three times as much by default."""
REFUSED = {"test_tensor_parallel": RELEASE.resolves_late, "dsv4": not RELEASE.deepseek_v4}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = pathlib.Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
            if REFUSED.get(item.path.stem) or REFUSED.get(item.path.parent.name):
                item.add_marker(pytest.mark.skip(reason="refused with this SGLang"))


@pytest.fixture(scope="session")
def extra() -> list[str]:
    """More arguments for every server (``SGLANG_LSA_TEST_SERVER_ARGS``), for machines that lack a part of SGLang."""
    return shlex.split(os.environ.get("SGLANG_LSA_TEST_SERVER_ARGS", ""))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, extra: list[str]) -> Iterator[dict[str, ServerProcess]]:
    """``stock``, ``lsa`` (CUDA graphs up to batch 256), ``eager``, and on Hopper ``fa3``."""
    folder = pathlib.Path(os.environ.get("SGLANG_LSA_TEST_LOGS", "") or tmp_path_factory.mktemp("logs"))
    model = ["--model-path", str(embedded_model_path())]
    many = ["--cuda-graph-max-bs-decode", "256", "--max-running-requests", "256"]
    few = ["--max-running-requests", "32"]
    kinds = {
        "stock": (STOCK, [*AS_LSA_ATTENDS, *few, "--cuda-graph-max-bs-decode", "8", "--max-total-tokens", "48000"]),
        "lsa": (LSA, [*many, *WITH_LSA]),
        "eager": (LSA, [*few, "--disable-cuda-graph", *WITH_LSA]),
    }
    if NO_FLASH_ATTENTION is None:
        kinds["fa3"] = (LSA, ["--attention-backend", "fa3", *few, "--cuda-graph-max-bs-decode", "32", *WITH_LSA])
    started = {
        name: ServerProcess(module, [*model, *SERVED, *flags, *extra], folder / f"{name}.log")
        for name, (module, flags) in kinds.items()
    }
    try:
        for server in started.values():
            server.wait_until_ready(READY_SECONDS)
        yield started
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture
def stock(servers: dict[str, ServerProcess]) -> ServerProcess:
    return servers["stock"]


@pytest.fixture
def lsa(servers: dict[str, ServerProcess]) -> ServerProcess:
    return servers["lsa"]


@pytest.fixture
def fa3(servers: dict[str, ServerProcess]) -> ServerProcess:
    if NO_FLASH_ATTENTION is not None:
        pytest.skip(NO_FLASH_ATTENTION)
    return servers["fa3"]


@pytest.fixture
def eager(servers: dict[str, ServerProcess]) -> ServerProcess:
    return servers["eager"]
