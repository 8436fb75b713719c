"""The benchmarks without GPUs: what counts, what is sent, what is read out of a status, results, client, CLI."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import pathlib
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from sglang_lsa import cli
from sglang_lsa.bench import (
    overhead,
    prefill,
    prefill_groups,
    prefill_report,
    refresh_together,
    report,
    serving,
    serving_arms,
)
from sglang_lsa.bench.client import run_together
from sglang_lsa.bench.plateau import Plateau, plateau
from sglang_lsa.bench.prefill_report import PREFILL
from sglang_lsa.bench.report import SERVING
from sglang_lsa.bench.serving import group_figures, held_bytes, lsa_figures, stock_kv_bytes
from sglang_lsa.bench.serving_arms import GROUPS, Arm, Group
from sglang_lsa.bench.shapes import SHAPES
from sglang_lsa.bench.systems import SYSTEMS
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.serve.status import status as status_of
from sglang_lsa.server_process import ServerFailed
from sglang_lsa.streaming import RequestFailed, Stream

GB = 1 << 30
VOCABULARY = 128256

# --- the plateau -----------------------------------------------------------------------------------------------------


def first_done() -> Stream:
    return Stream(0.5, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], done=True)


def last_started() -> Stream:
    """Two tokens a chunk."""
    return Stream(0.5, [3, 4, 5, 6, 7], [1, 3, 5, 7, 9])


@pytest.mark.parametrize(("skip", "seconds", "tokens"), [(0, 3, 9), (1, 2, 6), (2, 2, 6), (3, 1, 3)])
def test_a_plateau_begins_after_the_skipped_tokens_of_the_last_request(skip: int, seconds: float, tokens: int) -> None:
    found = plateau([first_done(), last_started()], skip)
    assert (found.running, found.seconds, found.tokens) == (2, seconds, tokens)
    assert found.tokens_per_s == 3


def test_pace_and_time_to_first_token() -> None:
    found = plateau([first_done(), last_started()], 1)
    assert sorted(found.itl_ms.tolist()) == [500, 500, 1000, 1000]
    assert [found.percentile(q) for q in (0, 50, 100)] == [500, 750, 1000]
    assert found.ttft_s == 1.5, "the median of 0.5 and 2.5"


@pytest.mark.parametrize(
    "other",
    [Stream(0.0), Stream(0.0, [6.5, 7], [1, 2]), Stream(0.0, [6, 7], [1, 2])],
    ids=["never started", "started after the end", "started at the end"],
)
def test_requests_that_did_not_run_at_the_same_time_do_not_count(other: Stream) -> None:
    alone, together = (plateau([first_done(), *more, last_started()]) for more in ([], [other]))
    assert (together.running, together.seconds, together.tokens) == (alone.running, alone.seconds, alone.tokens)
    assert together.ttft_s == alone.ttft_s


def test_the_first_that_finished_is_the_end() -> None:
    early = Stream(0, [1, 2, 5], [1, 2, 6], done=True)
    assert plateau([first_done(), early, last_started()]).seconds == 2


def test_one_request_is_a_plateau_of_its_own() -> None:
    found = plateau([first_done()], 2)
    assert (found.running, found.seconds, found.tokens, found.percentile(50)) == (1, 3, 3, 1000)


@pytest.mark.parametrize("streams", [[], [Stream(0)], [last_started()]], ids=["none", "no token", "running"])
def test_no_plateau_when_nothing_finished(streams: list[Stream]) -> None:
    with pytest.raises(ValueError, match="no request finished"):
        plateau(streams)


@pytest.mark.parametrize(
    ("streams", "skip"),
    [
        ([first_done(), Stream(0, [5.5, 6.5], [1, 2])], 0),
        ([first_done(), last_started()], 100),
        ([first_done()], 6),
    ],
    ids=["a moment", "all skipped", "one, all skipped"],
)
def test_no_plateau_when_nothing_is_left_to_measure(streams: list[Stream], skip: int) -> None:
    with pytest.raises(ValueError, match="did not overlap: ask for more tokens"):
        plateau(streams, skip)


# --- model shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "q_heads", "kv_heads", "head_dim", "token_bytes"),
    [("1b", 16, 32, 8, 64, 32768), ("8b", 32, 32, 8, 128, 131072), ("70b", 80, 64, 8, 128, 327680)],
    ids=["1b", "8b", "70b"],
)
def test_a_shape_is_a_configuration_of_transformers(
    name: str, layers: int, q_heads: int, kv_heads: int, head_dim: int, token_bytes: int, tmp_path: pathlib.Path
) -> None:
    from transformers import AutoConfig

    folder = SHAPES[name].write(tmp_path / "new" / name, 4096)
    assert folder == tmp_path / "new" / name
    assert SHAPES[name].write(folder, 8192) == folder, "writing again replaces it"
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, q_heads)
    assert (config.num_key_value_heads, config.head_dim) == (kv_heads, head_dim)
    assert config.hidden_size == q_heads * head_dim
    assert (config.vocab_size, config.max_position_embeddings) == (VOCABULARY, 8192)
    assert config.tie_word_embeddings == (name == "1b")
    assert SHAPES[name].token_bytes() == SHAPES[name].token_bytes("bfloat16") == token_bytes
    assert SHAPES[name].token_bytes("fp8_e4m3") == token_bytes // 2


# --- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arm",
    [Arm("tpot", 1000, 1, 8), Arm("iso", 700, 3, 8), Arm("shared", 900, 4, 8, shared=640)],
    ids=["single", "batch", "shared"],
)
def test_prompts_are_the_same_every_time(arm: Arm) -> None:
    prompts = arm.prompts(VOCABULARY)
    assert prompts == arm.prompts(VOCABULARY)
    assert [len(prompt) for prompt in prompts] == [arm.context] * arm.batch
    assert len({tuple(prompt) for prompt in prompts}) == arm.batch
    flat = np.array(prompts)
    assert flat.min() >= 10 and flat.max() < VOCABULARY
    assert all(type(token) is int for token in prompts[0]), "they go into JSON"


def test_single_prompts_are_beginnings_of_one_text() -> None:
    short, long = (Arm("tpot", context, 1, 8).prompts(VOCABULARY)[0] for context in (1024, 4096))
    assert long[:1024] == short


def test_agents_share_the_beginning_of_that_text_and_nothing_else() -> None:
    text = Arm("tpot", 4096, 1, 8).prompts(VOCABULARY)[0]
    prompts = Arm("shared", 2048 + 256, 4, 8, shared=2048).prompts(VOCABULARY)
    assert all(prompt[:2048] == text[:2048] for prompt in prompts)
    assert len({tuple(prompt[2048 : 2048 + 8]) for prompt in [*prompts, text]}) == 5


def test_prompts_of_a_batch_differ_from_those_of_other_batches() -> None:
    arms = (Arm("tpot", 500, 1, 8), Arm("iso", 500, 2, 8), Arm("iso", 500, 3, 8), Arm("iso", 501, 3, 8))
    beginnings = [tuple(prompt[:8]) for arm in arms for prompt in arm.prompts(VOCABULARY)]
    assert len(set(beginnings)) == len(beginnings) == 9


def test_no_two_arms_of_the_benchmark_are_the_same_row() -> None:
    keys = [(group.model, arm.workload, arm.context, arm.batch) for group in GROUPS for arm in group.arms]
    assert len(set(keys)) == len(keys)
    assert all(arm.context + arm.tokens < serving_arms.CONTEXT for group in GROUPS for arm in group.arms)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "pool_gb", "tokens"),
    [("1b", 8, 8 * GB // 32768), ("8b", 48, 48 * GB // 131072), ("1b", 0.1, 3264), ("8b", 0.0078125, 64)],
)
def test_a_pool_is_whole_pages(model: str, pool_gb: float, tokens: int) -> None:
    group = Group(model, pool_gb, ())
    assert group.pool_tokens == tokens
    assert group.pool_tokens % PAGE_SIZE == 0
    assert group.shape is SHAPES[model]


HOST_ARMS = {
    "one": ((Arm("tpot", 1000, 1, 24),), 1000 + 24 + 64),
    "largest": ((Arm("tpot", 1000, 1, 24), Arm("iso", 60_000, 10, 400)), 10 * (60_000 + 400 + 64)),
    "shared prefix once": ((Arm("shared", 101_000, 32, 240, shared=100_000),), 100_000 + 32 * (1000 + 240 + 64)),
}


@pytest.mark.parametrize(("arms", "tokens"), HOST_ARMS.values(), ids=HOST_ARMS)
def test_the_mirror_holds_the_largest_arm(arms: tuple[Arm, ...], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_arms, "available_host_memory", lambda: 1 << 50)
    wanted = (tokens + serving_arms.CONTEXT // 8) * 131072 / GB
    assert Group("8b", 1, arms).host_gb() == pytest.approx(wanted + 0.005, abs=0.006)


def test_the_mirror_holds_at_least_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_arms, "available_host_memory", lambda: 1 << 50)
    group = Group("8b", 48, HOST_ARMS["one"][0])
    assert group.host_gb() * GB > group.pool_tokens * 131072


def test_the_mirror_leaves_memory_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_arms, "available_host_memory", lambda: 40 * GB)
    assert Group("8b", 20, HOST_ARMS["largest"][0]).host_gb() == 40 - serving_arms.HOST_SPARE_GB


def test_too_little_memory_for_a_mirror_of_the_pool_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_arms, "available_host_memory", lambda: 40 * GB)
    with pytest.raises(ValueError, match="8b benchmark with 32 GB of KV needs 44 GB of host memory, 40 GB are free"):
        Group("8b", 32, HOST_ARMS["largest"][0]).host_gb()


def test_stock_holds_every_page_of_every_request() -> None:
    group, arm = Group("1b", 8, ()), Arm("iso", 1000, 4, 100)
    page = PAGE_SIZE * 32768
    assert stock_kv_bytes(group, arm, 3, 24, PAGE_SIZE) == 3 * 16 * page
    assert stock_kv_bytes(group, arm, 3, 25, PAGE_SIZE) == 3 * 17 * page, "a page that is begun is a page"
    assert stock_kv_bytes(group, arm, 3, 25, 1) == 3 * 1025 * 32768


def test_stock_holds_a_shared_prefix_once() -> None:
    arm = Arm("shared", 6400 + 128, 32, 100, shared=6400)
    assert stock_kv_bytes(Group("1b", 8, ()), arm, 32, 64, PAGE_SIZE) == (100 + 32 * 3) * PAGE_SIZE * 32768


# --- figures of the server's status ----------------------------------------------------------------------------------


def status(
    recalled: int, prefetched: int, late: int, refreshes: int, stalls: int, **decoding: tuple[int, int]
) -> dict[str, Any]:
    """``decoding``: samples and held pages by the number of requests that decoded, ``_2=(samples, pages)``."""
    return {
        "decoding": {
            name[1:]: dict(zip(("samples", "held_pages"), seen, strict=True)) for name, seen in decoding.items()
        },
        "page_bytes": 1000,
        "window": 64,
        "recalls": {
            "pages": recalled,
            "seconds": recalled * 1e-6,
            "prefetched_pages": prefetched,
            "late_pages": late,
        },
        "refreshes": refreshes,
        "refresh_host_seconds": refreshes * 0.001,
        "refresh_device_seconds": refreshes * 0.003,
        "stalls": stalls,
        "physical": {"overhead_bytes": {"summaries": 300, "tables": 40}},
        "host": {"mirror_bytes": 7000},
    }


FIGURES = Plateau(running=2, seconds=2.0, tokens=6400, itl_ms=np.array([1.0]), ttft_s=0.5)


def test_lsa_figures_are_what_the_arm_added() -> None:
    before, after = status(100, 50, 9, 30, 5, _2=(1, 10)), status(600, 250, 59, 130, 8, _2=(3, 30))
    found = lsa_figures(before, after, FIGURES)
    assert found == {
        "kv_gpu_bytes": 10_000,
        "lsa_overhead_gpu_bytes": 340,
        "host_bytes": 7000,
        "recalled_bytes": 500_000,
        "recall_gbps": pytest.approx(1.0),
        "prefetched_bytes": 200_000,
        "recall_hidden_fraction": pytest.approx(0.75),
        "refreshes": 100,
        "refresh_fraction": pytest.approx(0.004 * 100 / 2),
        "refresh_device_fraction": pytest.approx(0.003 * 100 / 2),
        "refresh_host_ms": pytest.approx(1.0),
        "refresh_device_ms": pytest.approx(3.0),
        "stalls": 3,
    }


def test_bytes_are_those_of_all_ranks() -> None:
    """A status is that of the first, which copies at the same time as the others."""
    before, after = status(100, 50, 9, 30, 5, _2=(1, 10)), status(600, 250, 59, 130, 8, _2=(3, 30))
    one, two = lsa_figures(before, after, FIGURES), lsa_figures(before, after, FIGURES, 2)
    twice = {name for name in one if name.endswith("_bytes") or name == "recall_gbps"}
    assert {name: value for name, value in two.items() if name in twice} == {name: 2 * one[name] for name in twice}
    assert all(two[name] == one[name] for name in set(one) - twice)


def test_figures_of_groups_are_by_step_with_groups() -> None:
    before = {"steps": 10, "saved_reads": 1000, "added_reads": 100, "formed": 4, "host_seconds": 0.5}
    after = {"steps": 30, "saved_reads": 5000, "added_reads": 300, "formed": 14, "host_seconds": 0.52}
    found = group_figures(before, after)
    assert found.pop("group_form_host_ms") == pytest.approx(2.0)
    assert found == {"group_steps": 20, "group_saved_reads": 200.0, "group_added_reads": 10.0, "group_forms": 10}
    assert group_figures(None, None) == {}


def test_lsa_figures_of_an_arm_that_recalled_nothing() -> None:
    same = status(100, 50, 9, 30, 5)
    found = lsa_figures(same, same, FIGURES)
    assert [found[name] for name in ("kv_gpu_bytes", "recall_gbps", "recall_hidden_fraction")] == [None] * 3
    zero = ("recalled_bytes", "prefetched_bytes", "refreshes", "refresh_fraction", "refresh_host_ms", "stalls")
    assert [found[name] for name in zero] == [0] * 6


def test_held_bytes_are_those_while_most_requests_decoded() -> None:
    """Of this arm: another one before it had more."""
    before = status(0, 0, 0, 0, 0, _2=(5, 10), _8=(4, 900))
    after = status(0, 0, 0, 0, 0, _2=(9, 20), _3=(4, 120), _8=(4, 900))
    assert held_bytes(before, after, 1000) == 30_000
    assert held_bytes(after, after, 1000) is None


# --- results ---------------------------------------------------------------------------------------------------------


def row(system: str, policy: str | None = None, **other: Any) -> dict[str, Any]:
    found = {
        "workload": "iso",
        "model": "8b",
        "system": system,
        "policy": policy,
        "context": 60_000,
        "batch": 13,
        "tp": 1,
        "running_requests": 4,
        "decode_tokens_per_s": 200.0,
        "tpot_ms_p50": 20.0,
        "tpot_ms_p99": 30.0,
        "kv_gpu_bytes": 32_000_000_000,
        "gpu": "GPU of a test",
        **ATTENDING[system],
    }
    return found | ({"stalls": 2} if system == "lsa" else {}) | other


ATTENDING: dict[str, dict[str, Any]] = {
    system: {"prefill_backend": prefill, "decode_backend": decode, "kv_dtype": "bfloat16", "page_size": page}
    for system, prefill, decode, page in (
        ("stock", "fa3", "fa3", 1),
        ("stock-flashinfer", "flashinfer", "flashinfer", 1),
        ("lsa", "fa3", "flashinfer", 64),
    )
}
STOCK = row("stock")
FLASHINFER = row("stock-flashinfer", decode_tokens_per_s=160.0, tpot_ms_p50=24.0)
LSA = row("lsa", "quest", running_requests=13, decode_tokens_per_s=650.0, tpot_ms_p50=16.0, recall_gbps=12.34)
OVER_STOCK = {"gain": 3.25, "gain_to": "stock", "gain_to_stock": 3.25}


def test_there_are_no_results_before_the_first_run(tmp_path: pathlib.Path) -> None:
    assert SERVING.read(tmp_path) == []


def test_a_later_row_replaces_an_earlier_one(tmp_path: pathlib.Path) -> None:
    SERVING.write(tmp_path, [STOCK, LSA, row("lsa", "random")])
    SERVING.write(tmp_path, [row("stock", decode_tokens_per_s=210.0), row("stock", batch=14)])
    rows = {(r["system"], r["policy"], r["batch"]): r["decode_tokens_per_s"] for r in SERVING.read(tmp_path)}
    assert rows == {
        ("stock", None, 13): 210.0,
        ("stock", None, 14): 200.0,
        ("lsa", "quest", 13): 650.0,
        ("lsa", "random", 13): 200.0,
    }
    assert len(SERVING.read(tmp_path)) == 4


def test_the_order_of_the_rows_does_not_depend_on_the_order_of_the_runs(tmp_path: pathlib.Path) -> None:
    rows = [STOCK, LSA, row("stock", workload="tpot", batch=1), row("stock", model="1b")]
    for folder, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / folder).mkdir()
        SERVING.write(tmp_path / folder, order)
    assert SERVING.read(tmp_path / "a") == SERVING.read(tmp_path / "b")


def test_results_are_written_as_csv_and_picture_too(tmp_path: pathlib.Path) -> None:
    single = [row(system, policy, workload="tpot", batch=1) for system, policy in (("stock", None), ("lsa", "quest"))]
    SERVING.write(tmp_path, [STOCK, LSA, *single])
    with (tmp_path / "serving.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {*STOCK, *LSA, *OVER_STOCK}
    assert [r["system"] for r in rows] == ["lsa", "stock", "lsa", "stock"]
    assert [r["recall_gbps"] for r in rows] == ["12.34", "", "", ""]
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads((tmp_path / "serving.json").read_text()) == SERVING.read(tmp_path)


@pytest.mark.parametrize("rows", [[], [STOCK], [LSA]], ids=["none", "stock", "lsa"])
def test_results_of_one_system_are_written(rows: list[dict[str, Any]], tmp_path: pathlib.Path) -> None:
    SERVING.write(tmp_path, rows)
    assert SERVING.read(tmp_path) == rows
    assert (tmp_path / "serving.png").exists()
    assert report.comparisons(rows) == []


def test_only_rows_of_the_same_arm_are_compared() -> None:
    others = [
        row("lsa", "quest", **other)
        for other in ({"context": 1024}, {"kv_dtype": "fp8_e4m3"}, {"gpu": "another card"}, {"model": "1b"})
    ]
    random = row("lsa", "random")
    found = report.comparisons([LSA, STOCK, *others, random])
    assert [(each.row, each.rivals) for each in found] == [(LSA, {"stock": STOCK}), (random, {"stock": STOCK})]


@pytest.mark.parametrize("workload", ["iso", "tpot"])
def test_lsa_is_compared_with_the_faster_stock_and_with_each(workload: str, tmp_path: pathlib.Path) -> None:
    rows = [each | {"workload": workload} for each in (FLASHINFER, LSA, STOCK)]
    SERVING.write(tmp_path, rows)
    (lsa,) = (each for each in SERVING.read(tmp_path) if each["system"] == "lsa")
    over = {"iso": (3.25, 650 / 160), "tpot": (1.25, 1.5)}[workload]
    assert (lsa["gain"], lsa["gain_to"]) == (over[0], "stock")
    assert (lsa["gain_to_stock"], lsa["gain_to_stock-flashinfer"]) == over
    SERVING.write(tmp_path, [rows[0] | {"decode_tokens_per_s": 325.0, "tpot_ms_p50": 10.0}])
    (lsa,) = (each for each in SERVING.read(tmp_path) if each["system"] == "lsa")
    assert (lsa["gain"], lsa["gain_to"]) == ({"iso": 2.0, "tpot": 0.625}[workload], "stock-flashinfer")
    assert lsa["gain_to_stock"] == over[0]


@pytest.mark.parametrize(("workload", "ratio"), [("tpot", 1.25), ("iso", 3.25), ("shared", 3.25)])
def test_gain_is_time_for_tpot_and_throughput_otherwise(workload: str, ratio: float) -> None:
    assert report.gain(STOCK | {"workload": workload}, LSA | {"workload": workload}) == ratio


def test_the_table_holds_all_systems_and_the_gain_over_each() -> None:
    text = io.StringIO()
    unmeasured = row("lsa", "random", kv_gpu_bytes=None)
    Console(file=text, width=240).print(report.table([LSA, STOCK, unmeasured, FLASHINFER]))
    assert "GPU of a test" in text.getvalue()
    stock, flashinfer, quest, more, random, _ = (
        line for line in text.getvalue().splitlines() if "13 x 60,000" in line or "x stock-" in line
    )
    for line, parts in (
        (stock, ("stock ", " fa3 ", "bfloat16", " 1 ", " 200 ", "20.00")),
        (flashinfer, ("stock-flashinfer", " flashinfer ", " 160 ", "24.00")),
        (quest, ("8b", "iso", "quest", "fa3/flashinfer", " 64 ", "650", "16.00", "3.25x stock", "32.0", "12.3")),
        (random, ("1.00x stock", " - ")),
        (more, ("4.06x stock-flashinfer",)),
    ):
        for part in parts:
            assert part in line


# --- the benchmark of prefill ----------------------------------------------------------------------------------------


def prefill_row(system: str, seconds: float, context: int = 131_072, **other: Any) -> dict[str, Any]:
    """Of a new prompt; of a question, when told how it reads its prefix."""
    found = {
        "model": "8b",
        "system": system,
        "pool_tokens": 140_032,
        "kv_pool_bytes": 140_032 * 131_072,
        "workload": "question" if "prefill" in other else "ttft",
        "context": context,
        "prefill": None,
        "device": None,
        "ttft_s": seconds,
        "ttft_all_s": [seconds],
        "gpu": "GPU of a test",
        "pool": "full",
        **ATTENDING[system],
    }
    lsa = {"streamed_bytes": 0, "recalled_bytes": 3 << 30, "staging_bytes": 300 << 20} if system == "lsa" else {}
    return found | lsa | other


QUARTER = {"pool": "quarter", "pool_tokens": 32_768, "kv_pool_bytes": 4 << 30, "streamed_bytes": 60 << 30}
NEW_PROMPTS = [
    prefill_row("stock", 10.0),
    prefill_row("lsa", 10.5),
    prefill_row("lsa", 12.0, **QUARTER),
    prefill_row("lsa", 60.0, 400_000, pool="16gb"),
]
FLASHINFER_PROMPT = prefill_row("stock-flashinfer", 15.0)
QUESTIONS = [
    prefill_row("lsa", 9.0, 263_168, prefill="exact", device="cold"),
    prefill_row("lsa", 1.5, 263_168, prefill="resident", device="cold"),
    prefill_row("lsa", 8.0, 263_168, prefill="exact", device="warm"),
    prefill_row("lsa", 0.5, 263_168, prefill="resident", device="warm"),
]


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    found = prefill_report.ratios(rows, ", ")
    return [found.get(id(row), "") for row in rows]


def test_prompts_are_compared_with_stock_and_questions_with_exact_answers() -> None:
    assert ratios(QUESTIONS) == ["", "6.00x faster", "", "16.00x faster"]
    assert ratios([*NEW_PROMPTS, *QUESTIONS[:2]]) == ["", "1.05x stock", "1.20x stock", "", "", "6.00x faster"]
    assert ratios([FLASHINFER_PROMPT, *NEW_PROMPTS[:2]]) == ["", "", "1.05x stock, 0.70x stock-flashinfer"]


def test_the_ratio_of_a_prompt_is_written_for_the_faster_stock_and_for_each(tmp_path: pathlib.Path) -> None:
    PREFILL.write(tmp_path, [*NEW_PROMPTS, FLASHINFER_PROMPT, *QUESTIONS])
    rows = {(row["system"], row["pool"], row["workload"]): row for row in PREFILL.read(tmp_path)}
    found = {name: value for name, value in rows["lsa", "quarter", "ttft"].items() if name.startswith("ttft_ratio")}
    assert found == {
        "ttft_ratio": 1.2,
        "ttft_ratio_to": "stock",
        "ttft_ratio_to_stock": 1.2,
        "ttft_ratio_to_stock-flashinfer": 0.8,
    }
    assert not any("ttft_ratio" in row for key, row in rows.items() if key[::2] != ("lsa", "ttft"))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="none"),
        pytest.param(NEW_PROMPTS[1:], id="no stock"),
        pytest.param([NEW_PROMPTS[0], NEW_PROMPTS[3]], id="stock of another prompt"),
        pytest.param([QUESTIONS[1], QUESTIONS[3]], id="no exact answer"),
        pytest.param([QUESTIONS[0], QUESTIONS[3]], id="exact on a cold device, resident on a warm one"),
        pytest.param([QUESTIONS[0] | {"pool_tokens": 64}, QUESTIONS[1]], id="exact with another pool"),
    ],
)
def test_what_cannot_be_compared_has_no_ratio(rows: list[dict[str, Any]]) -> None:
    assert ratios(rows) == [""] * len(rows)


def test_the_table_of_prefill() -> None:
    text = io.StringIO()
    Console(file=text, width=220).print(prefill_report.table([*NEW_PROMPTS, *QUESTIONS]))
    lines = [line for line in text.getvalue().splitlines() if "8b" in line]
    assert len(lines) == 8
    for line, parts in (
        (lines[0], ("stock", " fa3 ", "bfloat16", " 1 ", "full 17.1 GB", "131,072", "10.000", " - ")),
        (
            lines[1],
            ("lsa", "fa3/flashinfer", " 64 ", "full 17.1 GB", "10.500", "1.05x stock", " 0.0 ", " 3.0 ", " 300.0 "),
        ),
        (lines[2], ("lsa", "quarter 4.0 GB", "12.000", "1.20x stock", " 60.0 ")),
        (lines[5], ("question", "263,168", "resident", "cold", "1.500", "6.00x faster")),
    ):
        for part in parts:
            assert part in line
    assert "x stock" not in lines[3] and "x faster" not in lines[4]


@pytest.mark.parametrize(
    "rows",
    [[], NEW_PROMPTS[:1], QUESTIONS[:1], [*NEW_PROMPTS, *QUESTIONS]],
    ids=["none", "a prompt", "a question", "all"],
)
def test_the_picture_of_prefill(rows: list[dict[str, Any]], tmp_path: pathlib.Path) -> None:
    prefill_report.plot(tmp_path / "prefill.png", rows)
    picture = (tmp_path / "prefill.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000


def test_results_of_prefill_lie_beside_those_of_serving(tmp_path: pathlib.Path) -> None:
    """In files of their own, with a picture of their own; a later row of the same replaces an earlier one."""

    def write(rows: list[dict[str, Any]]) -> None:
        PREFILL.write(tmp_path, rows)

    SERVING.write(tmp_path, [STOCK, LSA])
    serving_files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write([*NEW_PROMPTS, *QUESTIONS])
    write([prefill_row("lsa", 11.0), QUESTIONS[0] | {"device": "hot"}])
    rows = PREFILL.read(tmp_path)
    times = {tuple(row[name] for name in prefill_report.KEY[:7]): row["ttft_s"] for row in rows}
    assert len(rows) == len(times) == 9
    assert times["8b", "lsa", "full", "ttft", 131_072, None, None] == 11.0
    assert times["8b", "lsa", "full", "question", 263_168, "exact", "cold"] == 9.0
    assert times["8b", "lsa", "quarter", "ttft", 131_072, None, None] == 12.0

    assert {path.name for path in tmp_path.iterdir()} == {
        *serving_files,
        *(f"prefill.{ending}" for ending in ("json", "csv", "png")),
    }
    assert all((tmp_path / name).read_bytes() == content for name, content in serving_files.items())
    with (tmp_path / "prefill.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["ttft_s"] for row in written] == [str(row["ttft_s"]) for row in rows]
    assert {row["streamed_bytes"] for row in written} == {"", "0", str(60 << 30)}


def test_the_rows_of_prefill_are_in_an_order_of_their_own(tmp_path: pathlib.Path) -> None:
    for folder, order in (("a", [*NEW_PROMPTS, *QUESTIONS]), ("b", [*QUESTIONS[::-1], *NEW_PROMPTS[::-1]])):
        (tmp_path / folder).mkdir()
        PREFILL.write(tmp_path / folder, order)
    assert PREFILL.read(tmp_path / "a") == PREFILL.read(tmp_path / "b")


GROUPS_OF_PREFILL = [
    *prefill_groups.groups(("full", "quarter", "16gb"), (), ("ttft", "question"), "auto"),
    *prefill_groups.groups(("full", "quarter", "16gb"), (131_072, 262_144), ("ttft", "question"), "fp8_e4m3"),
]


@pytest.mark.parametrize("group", GROUPS_OF_PREFILL, ids=lambda group: f"{group.name}-{group.pool_tokens}")
def test_the_mirror_holds_what_a_group_asks(group: prefill_groups.Group) -> None:
    """Pages that begin with a prompt end with it; the answers are a page each; resident questions leave nothing."""
    repeats = 3
    assert group.pool_tokens % PAGE_SIZE == 0
    assert group.host_tokens >= max(*group.prompts, 2 * prefill_groups.CHUNK) + PAGE_SIZE
    assert group.host_tokens >= group.pool_tokens + PAGE_SIZE
    if group.questions:
        fillers = -(-group.pool_tokens // prefill_groups.FILLER) * (prefill_groups.FILLER + PAGE_SIZE)
        asked = (2 * repeats + 1) * (prefill_groups.QUESTION + PAGE_SIZE)
        assert group.host_tokens >= prefill_groups.MEMORY + PAGE_SIZE + fillers + asked


def test_groups_of_prefill_are_what_their_names_say() -> None:
    full, quarter, sixteen, long, *quarters, fixed = GROUPS_OF_PREFILL
    assert full.pool_tokens >= prefill_groups.PROMPT + 2 * PAGE_SIZE
    assert quarter.pool_tokens * 4 == prefill_groups.PROMPT
    assert sixteen.pool_tokens * SHAPES["8b"].token_bytes() == 16 * GB
    assert [group.questions for group in (full, quarter, sixteen)] == [False, False, True]
    assert long.prompts == (131_072, 262_144) and long.pool_tokens >= 262_144 + 2 * PAGE_SIZE
    assert [(group.pool_tokens, group.prompts) for group in quarters] == [(32_768, (131_072,)), (65_536, (262_144,))]
    assert fixed.pool_tokens * SHAPES["8b"].token_bytes("fp8_e4m3") == 16 * GB


def test_groups_of_prefill_are_what_was_asked_for() -> None:
    assert prefill_groups.groups(("full", "quarter"), (), ("question",), "auto") == []
    (asked,) = prefill_groups.groups(("full", "16gb"), (), ("question",), "auto")
    assert (asked.name, asked.prompts, asked.questions) == ("16gb", (), True)
    assert asked.context > prefill_groups.MEMORY + prefill_groups.QUESTION


def test_stock_is_asked_for_what_its_pool_holds() -> None:
    stock, lsa = SYSTEMS["stock"], SYSTEMS["lsa"]
    assert [group.of_system(stock).prompts for group in GROUPS_OF_PREFILL] == [
        (131_072,),
        (),
        (),
        (131_072, 262_144),
        (),
        (),
        (131_072,),
    ]
    assert not any(group.of_system(stock).questions for group in GROUPS_OF_PREFILL)
    assert [group.of_system(lsa) for group in GROUPS_OF_PREFILL] == GROUPS_OF_PREFILL


# --- the client ------------------------------------------------------------------------------------------------------

Answer = Callable[[dict[str, Any], Callable[[Any], Awaitable[None]]], Awaitable[None]]


def ask(answer: Answer, prompts: Sequence[Sequence[int]], tokens: int, **more: Any) -> list[Stream]:
    """Send ``prompts`` to a server that answers with ``answer(body, send)``."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(chunk: Any) -> None:
            await response.write(
                b"data: " + (chunk if isinstance(chunk, str) else json.dumps(chunk)).encode() + b"\n\n"
            )

        await answer(body, send)
        await send("[DONE]")
        return response

    return serve(handle, prompts, tokens, **more)


def serve(handle: Any, prompts: Sequence[Sequence[int]], tokens: int, **more: Any) -> list[Stream]:
    async def both() -> list[Stream]:
        app = web.Application()
        app.router.add_post("/generate", handle)
        async with TestServer(app) as server:
            return await asyncio.wait_for(
                run_together(str(server.make_url("")).rstrip("/"), prompts, tokens, **more), 20
            )

    return asyncio.run(both())


def chunk(tokens: int) -> dict[str, Any]:
    return {"meta_info": {"completion_tokens": tokens, "cached_tokens": 5}}


@pytest.mark.parametrize("custom", [None, {"lsa": {"policy": "random"}}], ids=["stock", "lsa"])
def test_a_request_is_sent_and_its_tokens_are_timed(custom: dict[str, Any] | None) -> None:
    bodies = []

    async def answer(body: dict[str, Any], send: Callable[[Any], Awaitable[None]]) -> None:
        bodies.append(body)
        for tokens in (1, 4, 8):
            await send(chunk(tokens))
            await asyncio.sleep(0.002)

    (stream,) = ask(answer, [[11, 12, 13]], 8, custom_params=custom)
    assert stream.tokens == [1, 4, 8]
    assert stream.sent < stream.times[0] <= stream.times[1] <= stream.times[2]
    assert stream.cached == 5 and stream.done
    parameters: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    parameters |= {"custom_params": custom} if custom else {}
    assert bodies == [{"input_ids": [11, 12, 13], "sampling_params": parameters, "stream": True}]


def test_the_others_are_abandoned_when_the_first_has_all_its_tokens() -> None:
    begun: list[int] = []
    left: list[int] = []

    async def answer(body: dict[str, Any], send: Callable[[Any], Awaitable[None]]) -> None:
        (prompt,) = body["input_ids"]
        await send(chunk(1))
        begun.append(prompt)
        if prompt == 11:
            while len(begun) < 3:  # all are there at once
                await asyncio.sleep(0.001)
            await send(chunk(4))
        else:
            try:
                await asyncio.Event().wait()
            finally:
                left.append(prompt)

    streams = ask(answer, [[10], [11], [12]], 4)
    assert [stream.done for stream in streams] == [False, True, False]
    assert streams[1].tokens == [1, 4]
    assert all(stream.tokens in ([], [1]) for stream in (streams[0], streams[2]))
    assert sorted(left) == [10, 12]


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([], "ended after 0 of 4 tokens"),
        ([chunk(1), chunk(3)], "ended after 3 of 4 tokens"),
        ([chunk(1), {"error": {"message": "no room"}}], "no room"),
    ],
    ids=["nothing", "early end", "error in the stream"],
)
def test_a_request_that_got_too_little_failed(chunks: list[dict[str, Any]], words: str) -> None:
    async def answer(body: dict[str, Any], send: Callable[[Any], Awaitable[None]]) -> None:
        for each in chunks:
            await send(each)

    with pytest.raises(RequestFailed, match=words):
        ask(answer, [[10]], 4)


def test_a_request_that_was_refused_failed() -> None:
    async def handle(request: web.Request) -> web.Response:
        if (await request.json())["input_ids"] == [10]:
            return web.Response(status=400, text="prompt too long" + 600 * "!")
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(RequestFailed, match=r"HTTP 400: prompt too long!+$") as failure:
        serve(handle, [[9], [10]], 4)
    assert len(str(failure.value)) == len("HTTP 400: ") + 500


# --- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def keep_signal_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("keep_signal_handlers")
def test_no_gpu_is_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "serving", "--output", str(tmp_path / "out")]) == 1
    message = "sglang-lsa bench: sglang-lsa bench serving needs an NVIDIA GPU: torch sees none on this machine\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["serving", "--models", "80b"],
        ["serving", "--policies", "lru"],
        ["serving", "--models"],
        ["serving", "--arms", "1k,2k"],
        ["serving", "--systems", "vllm"],
        ["serving", "--kv-cache-dtype", "int8"],
        ["prefill", "--prompts", "128K"],
        ["prefill", "--prompts", "0"],
        ["prefill", "--pools", "full,"],
    ],
    ids=lambda argv: " ".join(argv) or "none",
)
def test_wrong_usage_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *argv])
    assert exit_.value.code == 2
    assert "usage: sglang-lsa bench" in capsys.readouterr().err


@pytest.mark.usefixtures("keep_signal_handlers")
@pytest.mark.parametrize(
    "failure", [ServerFailed("the log: x.log"), RequestFailed("HTTP 400: x.log")], ids=["server", "request"]
)
def test_a_failed_benchmark_is_status_1(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(output: pathlib.Path, console: Console, **asked: Any) -> None:
        assert output == tmp_path
        assert (asked["models"], asked["workloads"]) == (["1b"], ["iso"])
        assert asked["systems"] == ["stock", "stock-flashinfer", "lsa"]
        assert (asked["kv_dtype"], asked["resume"], asked["arms"]) == ("auto", False, list(serving_arms.ARMS))
        assert (asked["policies"], asked["server_args"]) == (["quest", "random"], "--tp 2")
        raise failure

    monkeypatch.setattr(serving, "run", run)
    argv = ["--models", "1b", "--workloads", "iso", "--server-args=--tp 2", "--output", str(tmp_path)]
    assert cli.main(["bench", "serving", *argv]) == 1
    assert "x.log" in capsys.readouterr().err


@pytest.mark.usefixtures("keep_signal_handlers")
def test_prefill_without_a_gpu_is_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "prefill", "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("sglang-lsa bench: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("keep_signal_handlers")
def test_what_prefill_is_asked_to_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(prefill, "run", lambda output, console, **asked: seen.append(asked | {"output": output}))
    assert cli.main(["bench", "prefill", "--output", str(tmp_path)]) == 0
    assert cli.main(["bench", "prefill", "--pools", "16gb", "--workloads", "question", "--repeats", "5"]) == 0
    assert [asked["pools"] for asked in seen] == [["full", "quarter", "16gb"], ["16gb"]]
    assert [asked["workloads"] for asked in seen] == [["ttft", "question"], ["question"]]
    assert [asked["repeats"] for asked in seen] == [3, 5]
    assert seen[0]["output"] == tmp_path


# --- the scheduler's own time ----------------------------------------------------------------------------------------


def test_overhead_is_that_of_requests_that_are_pruned_and_refreshed(tmp_path: pathlib.Path) -> None:
    """Times themselves are for machines that do nothing else."""
    scheduler = overhead.Scheduler(2, 4096)
    for _ in range(2):
        scheduler.prefill(4096)
    scheduler.crowd()
    for _ in range(70):
        scheduler.decode()
    lookahead, requests = scheduler.runtime.lookahead, scheduler.runtime.requests.values()
    assert lookahead.counts.refreshes >= 4 and lookahead.counts.failures == lookahead.counts.stalls == 0
    assert all(len(request.resident.positions) < 20 and request.resident.tail_start >= 64 for request in requests)
    assert scheduler.pager.ledger.recalls > 0, "pages come from the mirror"


def test_windows_that_begin_together_are_measured_stage_by_stage() -> None:
    """Every request is refreshed in every window, all in the same three steps, and pages come from the mirror."""
    found = refresh_together.measure_together(4, 4096)
    stages = [found[name] for name in ("queue_us", "choose_us", "switch_us")]
    assert min(stages) > 0 and found["total_us"] == pytest.approx(sum(stages))
    assert found["request_us"] == pytest.approx(found["total_us"] / 4) and found["recalled_pages"] > 0
    scheduler = refresh_together.together(4, 4096)
    counts, steps = scheduler.runtime.lookahead.counts, []
    for _ in range(refresh_together.WINDOW):
        before = counts.refreshes
        scheduler.decode()
        steps.append(counts.refreshes - before)
    assert sorted(steps)[-2:] == [0, 4]


def test_what_decode_holds_is_sampled_while_no_prompt_waits() -> None:
    """For ``held_bytes``: one look at 16 passes costs a step nothing that can be seen."""
    scheduler = overhead.Scheduler(2, 2048)
    for _ in range(2):
        scheduler.prefill(2048)
    held = []
    for _ in range(48):
        scheduler.decode()
        held.append(scheduler.pager.ledger.held_pages)
    seen = scheduler.runtime.decoding
    assert list(seen) == [2]
    assert seen[2].samples == 3 and min(held) <= seen[2].held_pages / 3 <= max(held)
    scheduler.pager.reservations.promise("r3", 1)
    for _ in range(16):
        scheduler.decode()
    assert seen[2].samples == 3
    assert status_of(scheduler.runtime)["decoding"] == {"2": {"samples": 3, "held_pages": seen[2].held_pages}}


def test_overhead_says_what_was_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "LONG", 8192)
    monkeypatch.setattr(overhead, "LONG_WINDOWS", 3)
    assert (
        cli.main(["bench", "overhead", "--requests", "1", "--tokens", "2048", "--output", str(tmp_path / "o.json")])
        == 0
    )
    found = json.loads((tmp_path / "o.json").read_text())
    (row,) = found["batches"]
    assert (row["requests"], row["tokens"], found["end"]["tokens"], found["end"]["windows"]) == (1, 2048, 8192, 5)
    assert all(value > 0 for value in row.values()) and found["end"]["end_ms"] > 0
    assert "end of a request of 8,192 tokens, 5 windows" in capsys.readouterr().out
    assert cli.main(["bench", "overhead", "--tokens", "64"]) == 1
    assert "1,024 tokens or more" in capsys.readouterr().err
