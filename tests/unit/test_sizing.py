"""plan_memory: sizes of device pool and host mirror, decided before anything is allocated."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine import observe, sizing
from sglang_lsa.engine.group_buffers import INT_WORKSPACE, KV_LENGTHS
from sglang_lsa.engine.policies import indexer as policy
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.engine.sizing import (
    HOST_SHARE,
    MemoryPlan,
    Needs,
    graph_tokens,
    max_resident_pages,
    plan_memory,
    selector_needs,
)
from sglang_lsa.indexer.checkpoint import IndexerConfig, ModelShape
from sglang_lsa.memory.layout.base import PageShape
from sglang_lsa.memory.layout.mha import MhaLayout, mha_shape
from sglang_lsa.memory.mirror import GB, available_host_memory
from sglang_lsa.memory.pager import Pager
from sglang_lsa.patches import arguments
from sglang_lsa.serve.status import overhead_bytes

TOKEN_BYTES = 16384  # 65,536 tokens in a GB
PAGE = PageShape(PAGE_SIZE, ((PAGE_SIZE * TOKEN_BYTES,),))
PLENTY = 1 << 40


def plan(device: str = "cpu", budgeted: int = PLENTY, context: int = 8192, **options: Any) -> MemoryPlan:
    return plan_memory(LSAConfig(**options), page=PAGE, budgeted_tokens=budgeted, context_tokens=context, device=device)


@pytest.fixture
def ten_gb_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_host_memory", lambda: 10 * GB)


# --- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ten_gb_free")
def test_on_a_cpu_the_device_pool_is_a_quarter_of_the_mirror() -> None:
    made = plan("cpu")
    assert made.virtual_tokens == 2 * 65536 - 64
    assert made.physical_tokens == (2 * 65536 - 64) // 4 // 64 * 64
    assert made.token_bytes == TOKEN_BYTES


@pytest.mark.usefixtures("ten_gb_free")
def test_on_a_cpu_the_device_pool_holds_one_whole_context() -> None:
    made = plan("cpu", context=65536)
    assert made.physical_tokens == 65536 + 128


def test_on_a_cpu_the_device_pool_is_at_most_the_mirror() -> None:
    made = plan("cpu", host_memory_gb=0.05, context=65536)
    assert made.physical_tokens == made.virtual_tokens == 3200


@pytest.mark.usefixtures("ten_gb_free")
def test_on_a_gpu_the_device_pool_is_what_sglang_budgeted() -> None:
    made = plan("cuda", budgeted=20_000)
    assert made.virtual_tokens == 6 * 65536 - 64
    assert made.physical_tokens == 20_000 // 64 * 64


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_mirror_takes_its_share_of_what_is_free(device: str) -> None:
    free = available_host_memory()
    made = plan(device, budgeted=16384, context=1024)
    share = made.virtual_tokens * TOKEN_BYTES / free
    assert share == pytest.approx(HOST_SHARE[device], rel=0.2)  # others use this machine, too


# --- what was asked for ----------------------------------------------------------------------------------------------


def test_sizes_that_were_asked_for() -> None:
    made = plan(host_memory_gb=0.25, device_tokens=1000)
    assert made == MemoryPlan(physical_tokens=960, virtual_tokens=16384 - 64, page=PAGE)


def test_mirror_and_its_padding_page_fit_into_what_was_asked_for() -> None:
    made = plan(host_memory_gb=0.1, device_tokens=1024)
    assert (made.virtual_tokens + 64) * TOKEN_BYTES <= 0.1 * GB < (made.virtual_tokens + 128) * TOKEN_BYTES


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_device_pool_in_gb(device: str) -> None:
    assert plan(device, host_memory_gb=0.25, device_memory_gb=0.125).physical_tokens == 8192


@pytest.mark.parametrize("options", [{"device_tokens": 8192}, {"device_memory_gb": 0.125}, {}])
def test_the_device_pool_never_exceeds_what_sglang_budgeted(options: dict[str, Any]) -> None:
    assert plan(host_memory_gb=0.25, budgeted=1000, **options).physical_tokens == 960


@pytest.mark.parametrize("options", [{}, {"device_tokens": 5001}, {"device_memory_gb": 0.0777}])
@pytest.mark.parametrize("token_bytes", [1000, 23040])
def test_sizes_are_whole_pages(options: dict[str, Any], token_bytes: int) -> None:
    config = LSAConfig(host_memory_gb=0.777, **options)
    page = PageShape(64, ((64 * token_bytes,),))
    made = plan_memory(config, page=page, budgeted_tokens=12345, context_tokens=100, device="cpu")
    assert made.physical_tokens % 64 == made.virtual_tokens % 64 == 0


def test_the_plan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sglang_lsa"):
        plan(host_memory_gb=0.25, device_tokens=1024)
    assert "device pool 1024 tokens (0.02 GB), host mirror 16320 tokens (0.25 GB)" in caplog.text


# --- refusals --------------------------------------------------------------------------------------------------------


def test_more_host_memory_than_there_is_is_refused() -> None:
    words = r"--lsa-host-memory-gb 1000000\.0 needs 1000000\.0 GB of host memory, \d+\.\d GB are free: lower it"
    with pytest.raises(ValueError, match=words):
        plan(host_memory_gb=1_000_000.0)


@pytest.mark.parametrize("options", [{"budgeted": 255}, {"device_memory_gb": 0.003}, {"device_memory_gb": 0.0}])
def test_a_device_pool_too_small_to_serve_is_refused(options: dict[str, Any]) -> None:
    words = r"the device pool would hold \d+ tokens \(0\.00\d GB\): give it at least 256 tokens \(0\.004 GB\)"
    with pytest.raises(ValueError, match=words):
        plan(host_memory_gb=0.25, **options)


@pytest.mark.parametrize("options", [{"device_tokens": 4096}, {"device_memory_gb": 0.0625}])
def test_a_mirror_smaller_than_the_device_pool_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the host mirror would hold 3200 tokens \(0\.05 GB\), fewer than") as caught:
        plan(host_memory_gb=0.05, **options)
    assert "raise --lsa-host-memory-gb to" in str(caught.value)


def test_the_advice_of_a_refusal_is_enough() -> None:
    with pytest.raises(ValueError, match="raise --lsa-host-memory-gb") as caught:
        plan(host_memory_gb=0.05, device_tokens=4096)
    advice = float(str(caught.value).split("--lsa-host-memory-gb to ")[1].split(" ")[0])
    made = plan(host_memory_gb=advice, device_tokens=4096)
    assert made.virtual_tokens >= made.physical_tokens == 4096


def test_no_host_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="the host mirror would hold"):
        plan(host_memory_gb=0.0, device_tokens=1024)


# --- what LSA's own buffers take on a GPU ----------------------------------------------------------------------------


MODEL: dict[str, int] = {
    "layers": 32,
    "q_heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "itemsize": 2,
}
NEEDS = Needs(rows=17, graph_batches=(16,), context_tokens=8192, page=PAGE_SIZE, page_key_bytes=1000, row_bytes=3000)


def test_needs_of_the_observers() -> None:
    config = LSAConfig(query_tokens=10, observe_layers=(1, 2, 3), staging_pages=7)
    page = mha_shape(64, 32, 8, 128, 128, 2)
    needs = selector_needs(config, page, rows=5, chunk_tokens=1000, graph_batches=(4,), context_tokens=8192, **MODEL)
    staging = 2 * 2 * 7 * 64 * 8 * 128 * 2 + 1000 * 32 * 129 * 4
    page_keys, rows = 3 * 2 * 8 * 128 * 2, 10 * 3 * 32 * 128 * 2
    assert needs == Needs(5, (4,), 8192, PAGE_SIZE, page_key_bytes=page_keys, row_bytes=rows, staging_bytes=staging)


@pytest.mark.parametrize(("query_tokens", "ring"), [(10, 24), (100, 100)])
def test_needs_of_an_indexer(query_tokens: int, ring: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers are observed, its keys are bytes, and as many positions are kept as vote for it or for quest."""
    heads = ((3, 0), (3, 9), (7, 31))
    shape = IndexerConfig(ModelShape(4096, 32, 32, 8, 128), heads, sub_keys=4, key_dim=64, positions=24)
    for module in (policy, observe):
        monkeypatch.setattr(module, "read_checkpoint_config", {"folder": shape}.__getitem__)
    config = LSAConfig(indexer="folder", query_tokens=query_tokens)
    page = mha_shape(64, 32, 8, 128, 128, 2)
    needs = selector_needs(config, page, rows=5, chunk_tokens=1000, graph_batches=(4,), context_tokens=8192, **MODEL)
    assert needs.page_key_bytes == 2 * 2 * 8 * 128 * 2
    assert needs.policy_bytes == {"indexer": 3 * 4 * 64}
    assert needs.overhead(config, 4096, 64 * 100)["indexer"] == 101 * 3 * 4 * 64
    assert needs.row_bytes == ring * 2 * 32 * 128 * 2


def test_overhead_is_what_the_buffers_will_take() -> None:
    """Against the buffers themselves."""
    config = LSAConfig(query_tokens=10, observe_layers=(1, 2), min_context=256)
    rows, context, physical, virtual = 5, 1024, 12, 40
    needs = selector_needs(
        config,
        mha_shape(64, 3, 2, 8, 8, 4),
        rows=rows,
        chunk_tokens=128,
        graph_batches=(4,),
        context_tokens=context,
        layers=3,
        q_heads=4,
        kv_heads=2,
        head_dim=8,
        itemsize=4,
        map_bytes=8,
    )
    overhead = needs.overhead(config, physical * 64, virtual * 64)
    keys, values = ([torch.zeros((physical + 1) * 64, 2, 8) for _ in range(3)] for _ in range(2))
    request_table = torch.zeros((rows, context), dtype=torch.int32)
    runtime = LSARuntime(config, Pager(MhaLayout(keys, values, 64), virtual), request_table, 4, 1.0, 128)
    runtime.reserve_graph_tokens(4)
    assert overhead_bytes(runtime) == overhead


@pytest.mark.parametrize(("graphs", "batch"), [((None, [1, 8, 256]), 96), ((512, None), 96), ((64, None), 64)])
def test_needs_of_a_server_as_one_told_them(graphs: tuple[int | None, list[int] | None], batch: int) -> None:
    """What ``/lsa/status`` said on an H100: Qwen2.5-Coder-0.5B-Instruct, its indexer, 96 requests at a time.

    SGLang captures no graph for more requests than can run.
    """
    decode = SimpleNamespace(backend="full", max_bs=graphs[0], bs=graphs[1])
    config = LSAConfig(indexer="qwen2.5-coder-0.5b-instruct", min_context=1024, widen=1.0)
    server_args = SimpleNamespace(
        lsa_config=config,
        device="cuda",
        cuda_graph_config=SimpleNamespace(decode=decode),
        max_running_requests=96,
        chunked_prefill_size=8192,
        max_prefill_tokens=16384,
    )
    model = SimpleNamespace(
        context_len=32768,
        num_attention_heads=14,
        head_dim=64,
        v_head_dim=64,
        get_num_kv_heads=lambda tp_size: 2 // tp_size,
    )
    needs = arguments.server_needs(server_args, model, layers=24, itemsize=2, extra_context=4, tp_size=1)
    assert needs.on_gpu and max(needs.graph_batches) == batch
    assert needs.overhead(config, 786_432, 19_113 * PAGE_SIZE) == {
        "page_keys": 39_145_472,
        "queries": 44_498_944,
        "tables": 277_052,
        "graph_indices": (786_432 + batch) * 4,
        "staging": 46_596_096,
        "indexer": 117_436_416,
    }


SIZES = [1, 2, 4, 8, 12, *range(16, 257, 8)]
"""Of CUDA graphs, as SGLang has them on an H200."""


@pytest.mark.parametrize(
    ("backend", "sizes", "requests", "batches"),
    [
        pytest.param("full", SIZES, 256, tuple(SIZES), id="all"),
        pytest.param("full", SIZES, 10, (1, 2, 4, 8, 10), id="no more than can run"),
        pytest.param("disabled", SIZES, 256, (), id="none"),
    ],
)
def test_graphs_that_are_captured(backend: str, sizes: list[int], requests: int, batches: tuple[int, ...]) -> None:
    graphs = SimpleNamespace(backend=backend, max_bs=max(sizes), bs=sizes)
    assert arguments.captured_batches(graphs, requests) == batches


@pytest.mark.parametrize(("tokens", "megabytes"), [(500_032, 16), (4_800_000, 149)])
def test_what_graphs_read_groups_from_is_planned(tokens: int, megabytes: int) -> None:
    """Each of them has room for the whole device pool in every group; beside that there are two workspaces."""
    needs, config = dataclasses.replace(NEEDS, rows=257, graph_batches=tuple(SIZES)), LSAConfig(groups=True)
    on_cpu, on_gpu = (dataclasses.replace(needs, on_gpu=where).overhead(config, tokens, tokens) for where in (0, 1))
    graphs = on_gpu["groups"] - on_cpu["groups"] - 2 * INT_WORKSPACE - KV_LENGTHS * len(SIZES) - 2 * 8 * 257
    assert round(graphs / 1e6) == megabytes
    assert {**on_gpu, "groups": 0} == {**on_cpu, "groups": 0}
    without = dataclasses.replace(needs, graph_batches=(), on_gpu=True).overhead(config, tokens, tokens)
    assert without["groups"] == on_cpu["groups"] + INT_WORKSPACE + KV_LENGTHS + 2 * 8 * 257
    assert "groups" not in dataclasses.replace(needs, on_gpu=True).overhead(LSAConfig(groups=False), tokens, tokens)


def test_needs_of_a_server_with_kv_in_fp8() -> None:
    """Half the bytes a token; what is observed is of the model's type, and so is what attention reads of blocks."""
    model = SimpleNamespace(
        context_len=8192,
        dtype=torch.bfloat16,
        num_attention_heads=32,
        head_dim=128,
        v_head_dim=128,
        get_num_kv_heads=lambda tp_size: 8,
    )
    server_args = SimpleNamespace(
        lsa_config=LSAConfig(staging_pages=7),
        device="cuda",
        cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(backend="full", max_bs=8, bs=None)),
        max_running_requests=8,
        chunked_prefill_size=1024,
    )
    shape = {"layers": 32, "tp_size": 1}
    pages = {itemsize: arguments.kv_page(model, itemsize=itemsize, **shape) for itemsize in (1, 2)}
    needs = {
        itemsize: arguments.server_needs(server_args, model, itemsize=itemsize, extra_context=4, **shape)
        for itemsize in pages
    }
    assert pages[2].page_bytes == 2 * pages[1].page_bytes
    assert needs[1].page_key_bytes == needs[2].page_key_bytes
    assert needs[1].row_bytes == needs[2].row_bytes
    blocks = 2 * 7 * 64 * 2 * 8 * 128
    assert needs[1].staging_bytes - needs[2].staging_bytes == blocks * 1 + blocks * 2 - blocks * 2
    budget = 64 * pages[2].page_bytes
    tokens = [
        plan_memory(
            LSAConfig(host_memory_gb=0.8),
            page=page,
            budgeted_tokens=budget // page.page_bytes * 64,
            context_tokens=8192,
            device="cuda",
        ).physical_tokens
        for page in pages.values()
    ]
    assert tokens[0] == 2 * tokens[1] == 2 * 64 * 64


@pytest.mark.parametrize(
    ("context", "physical", "pages"), [(1024, 1000, 16), (1025, 1000, 17), (8192, 20, 11), (8192, 21, 11)]
)
def test_columns_of_the_resident_table(context: int, physical: int, pages: int) -> None:
    assert max_resident_pages(context, physical, PAGE_SIZE) == pages


@pytest.mark.parametrize(
    ("options", "batch", "physical", "tokens"),
    [
        pytest.param({}, 0, 4096, 0, id="no graphs"),
        pytest.param({"min_context": 1024}, 4, 4096, 4 * (13107 + 3 * 64), id="budget"),
        pytest.param({"min_context": 20_000}, 4, 4096, 4 * (20_000 + 3 * 64), id="dense requests"),
        pytest.param({"min_context": 0, "min_pages": 300}, 4, 4096, 4 * (19_200 + 3 * 64), id="least pages"),
        pytest.param({"min_context": 0, "budget": 1e-3}, 4, 4096, 4 * (1536 + 3 * 64), id="floor"),
        pytest.param({"min_context": 0, "budget": 1e-3, "floor_tokens": 0}, 4, 2000, 4 * (512 + 3 * 64), id="no floor"),
        pytest.param({"min_context": 0, "window": 128}, 4, 4096, 4 * (13107 + 4 * 64), id="long windows"),
        pytest.param({"budget": 1.0}, 4, 4096, 4 * 131_072, id="whole contexts"),
        pytest.param({"widen": 2.0}, 4, 4096, 4 * (26_214 + 3 * 64), id="wider sets"),
        pytest.param({"min_context": 0, "min_pages": 300, "widen": 1.5}, 4, 0, 4 * (28_800 + 3 * 64), id="wider least"),
        pytest.param({"budget": 0.7, "widen": 2.0}, 4, 4096, 4 * 131_072, id="wider than the context"),
        pytest.param({"budget": "auto", "indexer": "x", "max_budget": 0.3}, 4, 0, 4 * (39_321 + 3 * 64), id="auto"),
        pytest.param({"min_context": 1024}, 2, 40_000, 40_000 + 2, id="device pool"),
    ],
)
def test_tokens_of_a_cuda_graph(options: dict[str, Any], batch: int, physical: int, tokens: int) -> None:
    config = LSAConfig(**{"budget": 0.1, "widen": 1.0, **options})
    assert graph_tokens(config, batch, 131_072, physical, PAGE_SIZE) == tokens


def planned(needs: Needs | None, budgeted: int, **options: Any) -> MemoryPlan:
    return plan_memory(
        LSAConfig(host_memory_gb=0.25, **options),
        page=PAGE,
        budgeted_tokens=budgeted,
        context_tokens=8192,
        device="cuda",
        needs=needs,
    )


def test_the_buffers_are_taken_from_the_budget() -> None:
    without, made = planned(None, 10_000), planned(NEEDS, 10_000)
    assert without.overhead == {}
    assert made.virtual_tokens == without.virtual_tokens
    assert set(made.overhead) == {"page_keys", "queries", "tables", "graph_indices", "staging"}
    total = sum(made.overhead.values())
    assert made.physical_tokens % 64 == 0
    assert made.physical_tokens * TOKEN_BYTES + total <= 10_000 * TOKEN_BYTES
    assert without.physical_tokens - made.physical_tokens <= -(-total // TOKEN_BYTES) + 2 * 64


def test_on_a_cpu_the_buffers_are_told_and_take_nothing_from_the_pool() -> None:
    options: dict[str, Any] = {"page": PAGE, "budgeted_tokens": 10_000, "context_tokens": 8192}
    config = LSAConfig(host_memory_gb=0.25, device_tokens=9984)
    made = plan_memory(config, **options, device="cpu", needs=NEEDS)
    assert made.physical_tokens == 9984
    assert made.overhead == NEEDS.overhead(config, 9984, made.virtual_tokens)


def test_a_small_device_pool_leaves_room_for_the_buffers_anyway() -> None:
    assert planned(NEEDS, 10_000, device_tokens=4096).physical_tokens == 4096


def test_overhead_is_that_of_the_pool_that_was_asked_for() -> None:
    made = planned(NEEDS, 10_000, device_tokens=4096)
    assert made.overhead == NEEDS.overhead(LSAConfig(), 4096, made.virtual_tokens)


def test_a_budget_that_the_buffers_use_up_is_refused() -> None:
    huge = Needs(
        rows=17, graph_batches=(), context_tokens=8192, page=PAGE_SIZE, page_key_bytes=1000, row_bytes=10_000_000
    )
    with pytest.raises(ValueError, match=r"the device pool would hold 0 tokens \(0\.000 GB\): give it at least 256"):
        planned(huge, 10_000)


def test_the_buffers_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sglang_lsa"):
        made = planned(NEEDS, 10_000)
    for name, size in made.overhead.items():
        assert f"{name.replace('_', ' ')} {size / GB:.3f} GB" in caplog.text
