"""A tiny DeepSeek-V4 on a GPU, beside SGLang without LSA: the same answers, of fewer pages on the device.

All servers have the same drawn weights (``dsv4_plugin``) and start at the same time:

- ``stock``: SGLang as it comes.
- ``masked``: SGLang with a mask over index logits, which is what a named resident set must amount to.
- ``lsa``: CUDA graphs, SGLang's own kernels throughout, a small device pool whose free pages hold NaN.
- ``retracting``: the same, and SGLang takes its place from a request that decodes every so many passes.
- ``ordered``: without graphs, a pool of little more than one prompt; attention adds up in the order of ``masked``.

What a difference means is measured first, between answers of SGLang without LSA. ``masked`` repeats itself to the bit,
and ``ordered`` must then repeat it; SGLang's own top-k hands on what it selects in any order, so that answers of
``stock`` to long prompts differ from run to run, and those of ``lsa`` may differ as much.

The servers are those of all files here, and end with the last of them.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import dsv4_kernels
import pytest
import torch
from dsv4_model import PAGE_BYTES, PAGE_TOKENS, write_config
from dsv4_pools import CHUNK, DEVICE_PAGES, FEW_PAGES, LONG, VIRTUAL_PAGES
from dsv4_servers import (
    Noise,
    Said,
    Servers,
    answers,
    ask,
    ask_together,
    install_plugin,
    largest,
    random_ids,
    start,
    write_retriever,
)
from gpu_servers import STOCK
from serving import assert_idle, flush_cache

from sglang_lsa.server_process import LSA, ServerProcess

MIRROR_GB = (VIRTUAL_PAGES + 1.5) * PAGE_BYTES / 2**30
COMMON = ["--max-total-tokens", str(VIRTUAL_PAGES * PAGE_TOKENS), "--chunked-prefill-size", str(CHUNK)]
WITH_LSA = ["--lsa-host-memory-gb", f"{MIRROR_GB:.6f}", "--lsa-min-context", "1024", "--lsa-debug"]
EAGER = ["--disable-cuda-graph"]
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "50"}
"""As when memory is full, which the pools of these servers never are for long enough."""
IN_ORDER = {"SGLANG_TOPK_TRANSFORM_512_TORCH": "1", "DSV4_TEST_SORTED": "1"}


def missing() -> str | None:
    """Why DeepSeek-V4 cannot be served here; None if it can."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "needs a GPU of compute capability 9 (Hopper)"
    for name in ("deep_gemm", "sgl_kernel.flash_mla", "tilelang"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} is not here ({error})"
    return None


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Logs, and what the plugin writes."""
    return pathlib.Path(os.environ.get("SGLANG_LSA_TEST_LOGS", "") or tmp_path_factory.mktemp("dsv4"))


@pytest.fixture(scope="package")
def servers(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, extra: list[str]) -> Iterator[Servers]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    subprocess.run([sys.executable, dsv4_kernels.__file__, str(CHUNK)], timeout=600)
    own = tmp_path_factory.mktemp("plugin")
    model, plugin = write_config(own / "model"), install_plugin(own / "site")
    pool = ["--lsa-device-tokens", str(DEVICE_PAGES * PAGE_TOKENS)]
    few = ["--lsa-device-tokens", str(FEW_PAGES * PAGE_TOKENS)]
    retriever = write_retriever(own / "retriever.pt")
    poison, scores = {"DSV4_TEST_POISON": str(folder / "poisoned")}, {"DSV4_TEST_SCORES": str(folder / "scores")}
    (folder / "scores").unlink(missing_ok=True)
    kinds: dict[str, tuple[str, list[str], dict[str, str]]] = {
        "stock": (STOCK, [], {}),
        "masked": (STOCK, [*EAGER, "--disable-overlap-schedule"], {**IN_ORDER, "DSV4_TEST_MASKED": "1"}),
        "lsa": (LSA, [*WITH_LSA, *pool], poison),
        "retracting": (LSA, [*WITH_LSA, *pool], RETRACTING),
        "ordered": (LSA, [*WITH_LSA, *few, *EAGER, "--lsa-indexer", str(retriever)], {**IN_ORDER, **scores}),
    }
    started = {
        name: start(
            module,
            model,
            plugin,
            [*COMMON, *flags, *extra],
            folder / f"dsv4-{name}.log",
            DSV4_TEST_POOLS=str(folder / f"pools-{name}.json"),
            **environment,
        )
        for name, (module, flags, environment) in kinds.items()
    }
    try:
        yield Servers(started)
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture
def stock(servers: Servers) -> ServerProcess:
    return servers["stock"]


@pytest.fixture
def masked(servers: Servers) -> ServerProcess:
    return servers["masked"]


@pytest.fixture
def lsa(servers: Servers) -> ServerProcess:
    return servers["lsa"]


@pytest.fixture
def retracting(servers: Servers) -> ServerProcess:
    return servers["retracting"]


@pytest.fixture
def ordered(servers: Servers) -> ServerProcess:
    return servers["ordered"]


@pytest.fixture(autouse=True)
def nothing_is_left(servers: Servers) -> Iterator[None]:
    """Servers live, and no page is held once nobody asks; ``--lsa-debug`` has checked the ledger after every pass."""
    yield
    for name, server in servers.items():
        assert server.process.poll() is None, f"{name} ended:\n{server.log_tail()}"
        if server.module == LSA:
            assert_idle(server)
            assert server.get("/lsa/status")["failures"] == {"refreshes": 0, "batches": 0, "integrity": 0}


@pytest.fixture(scope="package")
def noise(servers: Servers) -> Noise:
    """Of SGLang without LSA, against itself."""
    lengths = (300, 1500, 3000, 4100, 5000, 6000, 9000, 12_000)
    prompts = [random_ids(length, length) for length in lengths]

    def repeats(server: ServerProcess) -> float:
        return largest(*(answers(server, [*prompts, random_ids(LONG, 1)], 24) for _ in range(2)))

    with ThreadPoolExecutor(2) as pool:
        repeated, ordered = pool.map(repeats, (servers["stock"], servers["masked"]))
    first = answers(servers["stock"], prompts, 24)
    flush_cache(servers["stock"])
    return Noise(repeated, largest(first, ask_together(servers["stock"], prompts, 24)), ordered)


@pytest.fixture(scope="package")
def everything(servers: Servers) -> Said:
    """What the longest prompt is answered where nothing is left out."""
    return ask(servers["masked"], random_ids(LONG, 1), 128)
