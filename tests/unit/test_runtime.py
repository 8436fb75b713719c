"""LSARuntime: what it plans on the host is what the device reads. Servers test the rest of it."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_lsa.bench.overhead import Scheduler
from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.admission import Admitted
from sglang_lsa.engine.reading import IN_PLACE, RESIDENT, STREAMED
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.engine.sizing import selector_needs
from sglang_lsa.engine.step import Step
from sglang_lsa.engine.warm_up import compile_kernels
from sglang_lsa.kernels.page_table import decode_indices_reference, lanes_for
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.patches.batch import batch_of
from sglang_lsa.patches.requests import request_gone
from sglang_lsa.serve import metrics
from sglang_lsa.serve.metric import Counter
from sglang_lsa.serve.metric_table import METRICS
from sglang_lsa.serve.metrics import COUNTERS, GAUGES, measure
from sglang_lsa.serve.status import overhead_bytes, status

ROWS, CONTEXT = 9, 20 * PAGE_SIZE


def make_runtime(chunk: int | None = None, **options: object) -> LSARuntime:
    keys, values = ([torch.zeros(41 * PAGE_SIZE, 1, 2)] for _ in range(2))
    req_to_token = torch.zeros((ROWS, CONTEXT), dtype=torch.int32)
    config = LSAConfig(**options)
    pager = Pager(MhaLayout(keys, values, PAGE_SIZE), 64)
    return LSARuntime(config, pager, req_to_token, 2, 1.0, chunk_tokens=chunk)


def lengths_read(runtime: LSARuntime, rows: torch.Tensor, seq_lens: torch.Tensor) -> list[int]:
    """Where requests start in what the device reads."""
    indptr = torch.full((len(rows) + 1,), -1, dtype=torch.int32)
    indices = torch.empty(int(seq_lens.sum()) + 1, dtype=torch.int32)
    table, v2p = runtime.table.table, runtime.pager.v2p
    decode_indices_reference(table, runtime.req_to_token, v2p, rows, seq_lens, PAGE_SIZE, indptr, indices)
    return indptr.tolist()


@pytest.mark.parametrize("padding", [0, 3], ids=["no padding", "padding"])
def test_the_host_plans_what_the_device_reads(padding: int) -> None:
    runtime = make_runtime()
    rng = np.random.default_rng(padding)
    for _ in range(20):
        rows = 1 + rng.permutation(ROWS - 1)[: int(rng.integers(1, ROWS))]
        seq_lens = rng.integers(1, CONTEXT, len(rows))
        for row, length in zip(rows.tolist(), seq_lens.tolist(), strict=True):
            tail = int(rng.integers(0, length // PAGE_SIZE + 1))
            runtime.table.remap(row, rng.integers(1, 41, min(tail, int(rng.integers(0, 20)))), tail)
        step = Step(rows=rows)
        padded = torch.from_numpy(np.append(seq_lens, np.ones(padding, dtype=np.int64)))
        planned = step.decode_indptr(runtime.table, padded)
        assert planned.dtype == torch.int32
        all_rows = torch.from_numpy(np.append(rows, np.zeros(padding, dtype=np.int64)))
        assert planned.tolist() == lengths_read(runtime, all_rows, padded)
        assert padded[: len(rows)].tolist() == seq_lens.tolist(), "what SGLang passed was changed"


def test_no_batch_waits_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a kernel for each size of batch that it tells apart, and each type of lengths."""
    runtime, compiled = make_runtime(), set()

    def seen(table, req_to_token, v2p, rows, seq_lens, page, indptr, indices) -> None:
        decode_indices_reference(table, req_to_token, v2p, rows, seq_lens, page, indptr, indices)
        compiled.add((lanes_for(len(rows)), seq_lens.dtype, rows.dtype, indptr.dtype, indices.dtype))

    monkeypatch.setattr("sglang_lsa.engine.warm_up.decode_indices", seen)
    parts = runtime.observer, runtime.page_keys, runtime.policies, runtime.staging, runtime.req_to_token
    compile_kernels(runtime.pager, runtime.table, *parts)
    lanes = {lanes_for(batch) for batch in range(1, ROWS)}
    kinds = (torch.int32, torch.int64)
    assert compiled == {(size, kind, torch.int64, torch.int32, torch.int32) for size in lanes for kind in kinds}
    assert sorted({lanes_for(batch) for batch in range(1, 257)}) == [8, 64, 512]
    assert all(lanes_for(batch) >= batch for batch in (1, 8, 9, 64, 65, 512, 513, 5000))


def test_without_a_batch_every_row_is_padding() -> None:
    """As when CUDA graphs are captured."""
    runtime = make_runtime()
    runtime.table.remap(1, np.array([3]), 5)
    assert runtime.step.decode_indptr(runtime.table, torch.ones(4, dtype=torch.int32)).tolist() == [0, 1, 2, 3, 4]
    assert runtime.step.decode_indptr(runtime.table, torch.ones(0, dtype=torch.int32)).tolist() == [0]


def test_prefill_reads_everything() -> None:
    runtime = make_runtime()
    runtime.table.remap(2, np.array([3]), 5)
    assert runtime.everything.dtype == runtime.table.table.dtype
    indptr, indices = torch.zeros(2, dtype=torch.int32), torch.zeros(CONTEXT, dtype=torch.int32)
    decode_indices_reference(
        runtime.everything,
        runtime.req_to_token,
        runtime.pager.v2p,
        torch.tensor([2]),
        torch.tensor([400]),
        PAGE_SIZE,
        indptr,
        indices,
    )
    assert indptr.tolist() == [0, 400]


def test_on_a_cpu_a_refresh_is_done_at_once() -> None:
    runtime = make_runtime(prefetch_steps=7)
    assert (runtime.lookahead.clock.lead, runtime.lookahead.clock.lag) == (0, 0)


def test_graph_buffers_are_as_large_as_planned() -> None:
    runtime = make_runtime(min_context=256)
    assert runtime.graph_tokens == 0
    tokens = runtime.reserve_graph_tokens(4)
    assert tokens == runtime.graph_tokens > 40 * PAGE_SIZE


# --- configuration ---------------------------------------------------------------------------------------------------


def test_a_request_that_is_only_short_does_not_outgrow_the_pool(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sglang_lsa"):
        runtime = make_runtime(min_context=4096)
    assert "--lsa-min-context 4096 is more than half of the device pool; requests are pruned from 1280" in caplog.text
    assert runtime.lookahead.rules.config.min_context == runtime.prefill.config.min_context == 20 * PAGE_SIZE
    assert runtime.admission.config.min_context == 20 * PAGE_SIZE
    assert make_runtime(min_context=300).lookahead.rules.config.min_context == 300


@pytest.mark.parametrize(("chunk", "staged"), [(None, 3), (512, 3), (8192, 200)])
def test_staging_takes_what_was_planned_for_it(chunk: int | None, staged: int) -> None:
    runtime = make_runtime(chunk, staging_pages=staged)
    needs = selector_needs(
        runtime.config,
        runtime.pager.layout.shape,
        rows=ROWS,
        chunk_tokens=chunk or 0,
        graph_batches=(),
        context_tokens=CONTEXT,
        layers=1,
        q_heads=2,
        kv_heads=1,
        head_dim=2,
        itemsize=4,
    )
    assert runtime.staging_bytes == overhead_bytes(runtime)["staging"] == needs.staging_bytes
    assert runtime.staging.pages == staged


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_everything_that_is_measured_has_a_name_and_a_text() -> None:
    """And the status is plain JSON."""
    runtime = make_runtime()
    values = measure(runtime)
    assert list(values) == [*GAUGES, *COUNTERS] == [metric.name for metric in METRICS]
    shown = {"lsa_device_pages": 40, "lsa_staging_bytes": runtime.staging_bytes, "lsa_coverage": 1.0}
    shown["lsa_ranks"] = 1
    shown |= {"lsa_virtual_pages": 64, "lsa_host_mirror_bytes": runtime.pager.mirror.nbytes, "lsa_budget": 0.135}
    assert {name: value for name, value in values.items() if value} == shown
    assert json.loads(json.dumps(status(runtime))) == status(runtime)


def test_a_row_of_the_table_is_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else has to be told of it."""
    row = Counter("lsa_rows", "rows", "Rows of the table", lambda now: now.runtime.table.rows)
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, row))
    assert measure(make_runtime())["lsa_rows"] == ROWS
    assert metrics.markdown_table().endswith("\n| `sglang:lsa_rows_total` | counter | rows | Rows of the table |")


def test_counters_are_those_of_their_owners() -> None:
    runtime = make_runtime()
    runtime.pager.warmed_pages = 2
    runtime.pager.reservations.promise("a", 3)
    runtime.prefill.streamed_passes, runtime.staging.staged_pages, runtime.prefill.resident_prompts = 4, 5, 6
    runtime.admission.waits, runtime.admission.pressed, runtime.lookahead.counts.shrunk = 7, 8, 9
    runtime.host_evicted_pages, runtime.lookahead.counts.failures, runtime.failed_batches = 10, 11, 12
    runtime.prefill.radix_hit_tokens, runtime.prefill.prompt_tokens = 13, 14
    runtime.graphless_steps, runtime.config_changes, runtime.pager.transfer.recall_seconds = 15, 16, 17.0
    runtime.lookahead.counts.host_seconds, runtime.lookahead.counts.device_seconds = 18.0, 19.0
    runtime.pace.waits = 20
    values = measure(runtime)
    names = ("warmed_pages", "promised_pages", "streamed_passes", "streamed_pages", "resident_prompts")
    names += ("admission_waits", "retractions", "shrunk_sets", "host_evicted_pages", "refresh_failures")
    names += ("failed_batches", "prefix_hit_tokens", "prompt_tokens", "graphless_steps", "config_changes")
    names += ("recall_seconds", "refresh_host_seconds", "refresh_device_seconds", "paced_passes")
    assert [values[f"lsa_{name}"] for name in names] == list(range(2, 21))
    shown = status(runtime)
    page = runtime.pager.page_bytes
    assert shown["prefill"] == {
        "streamed_passes": 4,
        "streamed_pages": 5,
        "streamed_bytes": 5 * page,
        "resident_prompts": 6,
    }
    assert shown["pressure"] == {
        "admission_waits": 7,
        "paced_passes": 20,
        "shrunk_sets": 9,
        "retractions": 8,
        "host_evicted_pages": 10,
    }
    assert shown["failures"] == {"refreshes": 11, "batches": 12, "integrity": 0}
    assert (shown["recalls"]["warmed_pages"], shown["physical"]["promised"]) == (2, 3)


def test_counters_of_groups_are_those_of_their_owners() -> None:
    runtime = make_runtime(groups=True)
    assert runtime.groups is not None
    known = runtime.groups
    known.steps, known.saved_reads, known.added_reads, known.formed, known.host_seconds = 2, 3, 4, 6, 7.0
    runtime.lookahead.counts.exchanged = 5
    names = ("steps", "saved_reads", "added_reads", "exchanged_pages", "formed", "host_seconds")
    assert [status(runtime)["groups"][name] for name in names] == list(range(2, 8))
    values = measure(runtime)
    metrics_of = [f"lsa_group_{name}" if name != "formed" else "lsa_groups_formed" for name in names]
    assert [values[name] for name in metrics_of] == list(range(2, 8))


@pytest.mark.parametrize("indexer", [None, object()], ids=["quest", "indexer"])
def test_new_weights_make_an_indexer_stale(indexer: object, caplog: pytest.LogCaptureFixture) -> None:
    """It was trained for the old ones. A policy without training is not."""
    runtime = make_runtime()
    runtime.indexer = indexer  # type: ignore[assignment]
    assert measure(runtime)["lsa_indexer_stale"] == 0
    runtime.weights_changed()
    values = measure(runtime)
    assert (values["lsa_weight_updates"], values["lsa_indexer_stale"]) == (1, indexer is not None)
    assert ("was trained for those before" in caplog.text) == (indexer is not None)


def test_the_resident_share_is_the_mean_of_the_running_requests() -> None:
    runtime = make_runtime()
    for rid, pages, resident in (("a", 10, 10), ("b", 8, 2), ("c", 0, 0)):
        request = Request(rid, 1, Asked("quest", 0.5), tokens=pages * PAGE_SIZE, pages=np.arange(1, pages + 1))
        request.resident.tail_start, request.resident.positions = pages, np.arange(resident)
        runtime.requests[rid] = request
    values = measure(runtime)
    assert (values["lsa_context_pages"], values["lsa_resident_pages"]) == (18, 12)
    assert values["lsa_resident_share"] == (1 + 0.25) / 2, "one without a page yet does not count"


# --- trouble ---------------------------------------------------------------------------------------------------------


def held(runtime: LSARuntime, rid: str, *pages: int) -> None:
    runtime.pager.ledger.allocate(pages)
    assert runtime.pager.hold(rid, pages)


def test_a_pass_that_was_given_up_leaves_nothing_in_flight() -> None:
    """What its requests held can be had as soon as they are released."""
    runtime = make_runtime()
    held(runtime, "a", *range(1, 41))
    runtime.step = Step(rows=np.array([1]))
    runtime.pager.ledger.forward_started()
    runtime.forward_failed(MemoryError())
    assert (runtime.failed_batches, len(runtime.step.rows)) == (1, 0)
    runtime.pager.forget("a")
    runtime.pager.ledger.release(np.arange(1, 41))
    assert runtime.pager.unpromised_pages == 40
    runtime.pager.reset()


def test_a_pass_that_was_given_up_before_it_started() -> None:
    runtime = make_runtime()
    runtime.forward_failed(MemoryError())
    assert (runtime.failed_batches, runtime.pager.ledger.passes) == (1, 0)


def test_running_requests_shrink_before_one_is_retracted() -> None:
    runtime = make_runtime(policy="recency", min_pages=1, floor_tokens=0, budget=0.5, min_context=64)
    request = Request("a", 1, Asked("recency", 0.5), tokens=20 * PAGE_SIZE)
    request.pages = np.arange(1, 21)
    held(runtime, "a", *range(1, 21))
    runtime.pager.store(request.pages)
    runtime.requests["a"] = request
    runtime.lookahead.begin(request)
    held(runtime, "b", *range(21, 51))
    assert (len(request.resident.positions), runtime.pager.unpromised_pages) == (10, 0)
    opening = [20 * PAGE_SIZE] * 3
    assert runtime.can_decode(opening)
    assert (len(request.resident.positions), request.story.shrunk, runtime.admission.pressed) == (5, 1, 0)
    assert runtime.pager.unpromised_pages == 5
    assert not runtime.can_decode(opening * 3)
    assert runtime.admission.pressed == 1


@pytest.mark.parametrize(("how", "exact"), [(IN_PLACE, True), (STREAMED, True), (RESIDENT, False), (None, True)])
def test_only_prompts_over_a_resident_prefix_are_not_exact(how: str | None, exact: bool) -> None:
    runtime = make_runtime()
    if how is not None:
        runtime.admission.admitted["a"] = Admitted(how, np.zeros(0, dtype=np.int64), 3)
    assert runtime.shared.is_exact("a") is exact


@pytest.mark.parametrize("debug", [False, True])
def test_an_idle_server_checks_its_records_once(debug: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What it finds is counted and said; it ends the server only with ``--lsa-debug``."""
    runtime = make_runtime(debug=debug)
    runtime.pager.ledger.allocate([1])
    assert runtime.pager.hold("nobody", [1])
    runtime.on_idle()
    assert runtime.integrity_failures == 0, "no forward pass since the start"
    batch = SimpleNamespace(
        reqs=[],
        seq_lens_cpu=torch.zeros(0, dtype=torch.int64),
        forward_mode=SimpleNamespace(is_extend=lambda: False, is_decode=lambda: False),
    )
    for _ in range(2):
        runtime.pager.forward_queued(runtime.before_forward(batch_of(batch), np.zeros(0, dtype=np.int64)))
        with caplog.at_level(logging.ERROR, logger="sglang_lsa"), _raises(RuntimeError if debug else None):
            runtime.on_idle()
        runtime.on_idle()
    assert runtime.integrity_failures == 2
    assert caplog.text.count("inconsistent, please report it: LSA: requests ['nobody'] are gone but hold pages") == 2


def _raises(error: type[Exception] | None) -> AbstractContextManager[object]:
    return pytest.raises(error) if error is not None else nullcontext()


def test_nothing_of_a_request_that_is_gone_is_left() -> None:
    """Also of one that was still being prefilled, and could not be read whole."""
    runtime = make_runtime()
    request = Request("a", 1, Asked("quest", 0.5), tokens=100)
    request.pages = np.array([1, 2])
    held(runtime, "a", 1, 2)
    runtime.requests["a"] = request
    runtime.lookahead.sets.await_first(request)
    runtime.lookahead.refresher.on_their_way["a"] = request
    runtime.pager.reservations.promise("a", 5)
    runtime.admission.admitted["a"] = Admitted(STREAMED, np.zeros(0, dtype=np.int64), 5)
    runtime.request_gone("a", complete=True)
    assert runtime.requests == runtime.admission.admitted == {}
    assert runtime.pager.reservations.holders() == []
    assert runtime.lookahead.sets.incomplete == runtime.lookahead.refresher.on_their_way == {}
    assert runtime.pager.ledger.holders() == []
    assert [(done.summary["rid"], done.summary["number"]) for done in runtime.finished] == [("a", 1)]
    runtime.request_gone("a", complete=True)
    assert runtime.finished_requests == 1


def test_who_decodes_is_looked_up_again_when_somebody_came_or_went() -> None:
    """A request that takes the name and the row of one that is gone is another one; else it is not asked again."""
    scheduler = Scheduler(3, 2048)
    for _ in range(3):
        scheduler.prefill(2048)
    scheduler.decode()
    decoded = scheduler.runtime._decoded
    assert decoded is not None and decoded[0] == ("r1", "r2", "r3")
    scheduler.decode()
    assert scheduler.runtime._decoded is decoded
    gone, before = scheduler.requests.pop(), scheduler.runtime.requests["r3"]
    request_gone(scheduler.runtime, gone)
    assert scheduler.runtime._decoded is None
    scheduler.prefill(1024)
    for _ in range(2):
        scheduler.decode()
    here = scheduler.runtime.requests
    assert [here[name].computed for name in ("r1", "r2", "r3")] == [2052, 2052, 1026]
    assert here["r3"] is not before and before.computed == 2050
    assert [len(here[name].story.windows) and here[name].story.windows[-1].tokens for name in here] == [
        2049,
        2049,
        1025,
    ]
    scheduler.requests.reverse()
    scheduler.decode()
    again = scheduler.runtime._decoded
    assert again is not None and [one.key for one in again[1]] == ["r3", "r2", "r1"] and again[1][0] is here["r3"]
    assert again[2].tolist() == [3, 2, 1]
