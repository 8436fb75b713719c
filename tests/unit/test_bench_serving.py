"""``bench serving`` without a GPU: model shapes, prompts, memory, and figures of a server's status."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from bench_rows import GB

from sglang_lsa.bench import serving_arms
from sglang_lsa.bench.plateau import Plateau
from sglang_lsa.bench.serving import group_figures, held_bytes, lsa_figures, stock_kv_bytes
from sglang_lsa.bench.serving_arms import GROUPS, Arm, Group
from sglang_lsa.bench.shapes import SHAPES
from sglang_lsa.config import PAGE_SIZE

VOCABULARY = 128256

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


FIGURES = Plateau(running=2, seconds=2.0, tokens=6400, itl_ms=np.array([1.0]), ttft_s=0.5, ttft_last_s=0.75)


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
