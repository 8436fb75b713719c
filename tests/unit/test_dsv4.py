"""DeepSeek-V4 as far as a CPU goes: its pages, its sizes, what a server accepts, and the engine over its layout."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import simulation
import torch
from dsv4_model import C4_LAYERS, FLASH_RATIOS, INDEX_ROW, KV_ROW, PAGE_BYTES, write_config
from simulation import failure_of

from sglang_lsa.config import FULL, LSAConfig
from sglang_lsa.engine import sizing
from sglang_lsa.engine.admission import Admission
from sglang_lsa.engine.arrival import Arrival, Prompt
from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.native_index import NativeIndex, page_bytes, scorer_layers
from sglang_lsa.engine.policies import needed
from sglang_lsa.engine.reading import IN_PLACE
from sglang_lsa.engine.sizing import MemoryPlan, plan_memory
from sglang_lsa.engine.sizing_dsv4 import VIRTUAL_SHARE, beside, budgeted_tokens, dsv4_needs
from sglang_lsa.memory.layout import dsv4
from sglang_lsa.memory.layout.dsv4 import Dsv4Layout, dsv4_shape
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.mirror import GB
from sglang_lsa.memory.pager import Pager
from sglang_lsa.patches import compatibility
from sglang_lsa.patches.architectures import named_architecture

PAGE, PHYSICAL, VIRTUAL = 256, 6, 10
START = pathlib.Path(__file__).parents[1] / "support" / "dsv4_start.py"
INDEX = NativeIndex(C4_LAYERS, 64, 128, 4096, torch.bfloat16)
FLASH_INDEX = NativeIndex(
    tuple(layer for layer, ratio in enumerate(FLASH_RATIOS) if ratio == 4), 64, 128, 4096, INDEX.dtype
)
PRO_INDEX = NativeIndex(tuple(range(0, 60, 2)), 64, 128, 7168, INDEX.dtype)
"""DeepSeek-V4-Pro: 30 of 61 layers have pages."""


def rows(width: int, pages: int = PHYSICAL) -> dict[int, torch.Tensor]:
    """Bytes by layer."""
    return {layer: torch.randint(0, 256, (pages + 1, width), dtype=torch.uint8) for layer in C4_LAYERS}


# --- the layout ------------------------------------------------------------------------------------------------------


def test_a_page_is_a_row_of_entries_and_a_row_of_index_keys_of_each_layer() -> None:
    layout = Dsv4Layout(rows(KV_ROW), rows(INDEX_ROW))
    assert (layout.page_tokens, layout.physical_pages, layout.page_bytes) == (PAGE, PHYSICAL, PAGE_BYTES)
    assert [(piece.layer, piece.nbytes, piece.offset) for piece in layout.pieces] == [
        (1, 37_440, 0),
        (1, 8_448, 37_440),
        (3, 37_440, 45_888),
        (3, 8_448, 83_328),
        (5, 37_440, 91_776),
        (5, 8_448, 129_216),
    ]
    assert all(piece.offset % 16 == piece.nbytes % 16 == 0 for piece in layout.pieces)
    assert layout.shape == dsv4_shape(3)
    assert layout.keys(1, torch.zeros(1, dtype=torch.int64)) is None
    with pytest.raises(ValueError, match="a Dsv4Layout shows no keys"):
        layout.keys_of([1], torch.zeros(1, dtype=torch.int64))


def test_dsv4_pages_of_flash_weigh_what_the_paper_says() -> None:
    assert dsv4_shape(21).page_bytes == 963_648
    assert (dsv4.KV_ROW, dsv4.INDEX_ROW) == (-(-64 * 584 // 576) * 576, 64 * 132)
    with pytest.raises(ValueError, match="has 0 layers that keep one entry for 4 tokens"):
        dsv4_shape(0)


def test_other_rows_are_no_such_layout() -> None:
    kv, index = rows(KV_ROW), rows(INDEX_ROW)
    with pytest.raises(ValueError, match=r"entries of layer 1 are .*37376.*give .pages, 37440"):
        Dsv4Layout(rows(37_376), index)
    with pytest.raises(ValueError, match=r"index keys of layer 1 are .*4352.*FP8 index keys"):
        Dsv4Layout(kv, rows(4_352))
    del index[3]
    with pytest.raises(ValueError, match="layer 3 has entries or index keys only: give both"):
        Dsv4Layout(kv, index)
    with pytest.raises(ValueError, match="no layer has pages"):
        Dsv4Layout({}, {})
    with pytest.raises(ValueError, match="has 7 pages, others have 8"):
        Dsv4Layout(kv | {1: rows(KV_ROW, 7)[1]}, rows(INDEX_ROW))


def test_a_page_comes_back_as_it_went() -> None:
    layout = Dsv4Layout(rows(KV_ROW), rows(INDEX_ROW))
    pager = Pager(layout, VIRTUAL)
    pager.ledger.allocate(range(1, VIRTUAL + 1))
    assert pager.hold("a", [7, 2, 4])
    before = [layout.pieces[n].buffer[pager.ledger.v2p[[7, 2, 4]]].clone() for n in range(6)]
    pager.store(np.array([7, 2, 4]))
    pager.forget("a")
    assert pager.hold("b", [1, 3, 5, 6, 8, 9]), "what was there is given up"
    for piece in layout.pieces:
        piece.buffer.fill_(0xFF)
    pager.forget("b")
    pager.ledger.release([1, 3, 5, 6, 8, 9])
    assert pager.hold("a", [7, 2, 4])
    for piece, was in zip(layout.pieces, before, strict=True):
        assert torch.equal(piece.buffer[pager.ledger.v2p[[7, 2, 4]]], was)


# --- its index -------------------------------------------------------------------------------------------------------


def test_layers_whose_index_keys_are_kept() -> None:
    assert scorer_layers(LSAConfig(), INDEX) == (1, 3, 5)
    assert scorer_layers(LSAConfig(), FLASH_INDEX) == (22, 26, 42), "those of the published checkpoint"
    assert scorer_layers(LSAConfig(observe_layers=(5,)), INDEX) == (5,)
    assert page_bytes(LSAConfig(), FLASH_INDEX) == 25_344
    with pytest.raises(ValueError, match="names layer 2, which has no index: use some of 1, 3, 5"):
        scorer_layers(LSAConfig(observe_layers=(1, 2)), INDEX)


def test_policies_of_a_model_with_an_index_look_at_no_keys_of_attention() -> None:
    names = {policy.name for policy in needed(LSAConfig(), index=True)}
    assert {"recency", "random"} <= names
    assert not names & {"quest", "indexer"}
    assert not any(policy.index for policy in needed(LSAConfig()))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c4", "c128", "page"), [(21, 20, 963_648), (30, 31, 1_376_640), (3, 2, 137_664)], ids=["Flash", "Pro", "tiny"]
)
def test_what_sglang_budgets_in_pages(c4: int, c128: int, page: int) -> None:
    """SGLang counts entries without what fills up their rows; bytes of its window and states are left alone."""
    stock = 10_000 * PAGE
    pages = budgeted_tokens(stock, c4, c128) // PAGE
    assert pages * page <= 10_000 * (64 * c4 * (584 + 132) + 2 * c128 * 584) < (pages + 1) * page
    assert 1.0 < pages / 10_000 < 1.03


def planned(config: LSAConfig, index: NativeIndex, c128: int, budgeted: int) -> MemoryPlan:
    return plan_memory(
        config,
        page=dsv4_shape(len(index.layers)),
        budgeted_tokens=budgeted,
        context_tokens=1 << 20,
        device="cuda",
        needs=dsv4_needs(config, index, rows=9, context_tokens=1 << 20, c128_layers=c128),
    )


@pytest.mark.parametrize(
    ("index", "c128", "page"), [(FLASH_INDEX, 20, 963_648), (PRO_INDEX, 31, 1_376_640)], ids=["Flash", "Pro"]
)
def test_what_virtual_pages_take_is_subtracted(
    index: NativeIndex, c128: int, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "available_host_memory", lambda: 10_000 * GB)
    monkeypatch.setattr(sizing, "require_host_memory", lambda *_: None)
    budgeted = 40 * GB // page * PAGE
    made = planned(LSAConfig(host_memory_gb=100), index, c128, budgeted)
    virtual = made.virtual_tokens // PAGE
    assert virtual == 100 * GB // page - 1
    each = c128 * 1_728 + 256 * 8
    assert made.overhead["c128_kv"] + made.overhead["swa_map"] == (virtual + 1) * each
    assert made.overhead["page_keys"] == (virtual + 1) * 3 * INDEX_ROW
    taken = sum(made.overhead.values()) + made.physical_tokens // PAGE * page
    assert 0 <= budgeted // PAGE * page - taken < 2 * page
    assert made.overhead["staging"] == made.overhead["graph_indices"] == 0


def test_a_mirror_of_no_asked_size_leaves_most_of_the_device_to_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_host_memory", lambda: 10_000 * GB)
    budgeted = 40 * GB // 963_648 * PAGE
    made = planned(LSAConfig(), FLASH_INDEX, 20, budgeted)
    share = sum(made.overhead.values()) / (40 * GB)
    assert VIRTUAL_SHARE * 0.99 < share < VIRTUAL_SHARE * 1.01
    assert made.virtual_tokens / made.physical_tokens > 7
    monkeypatch.setattr(sizing, "available_host_memory", lambda: 50 * GB)
    assert planned(LSAConfig(), FLASH_INDEX, 20, budgeted).virtual_tokens // PAGE == 30 * GB // 963_648 - 1


def test_what_a_dense_model_keeps_of_virtual_pages_bounds_nothing() -> None:
    assert sizing.Needs(9, (8,), 1 << 20, 64, 10_000, 10).most_virtual(1) == float("inf")


# --- admission and the step ------------------------------------------------------------------------------------------


def admission(physical: int = 24) -> Admission:
    layout = Dsv4Layout(
        {1: torch.zeros(physical + 1, KV_ROW, dtype=torch.uint8)},
        {1: torch.zeros(physical + 1, INDEX_ROW, dtype=torch.uint8)},
    )
    config = LSAConfig(budget=0.5, min_pages=1, floor_tokens=0, min_context=4 * PAGE, policy="recency")
    return Admission(Pager(layout, 100), Rules(config, physical / 2, {}), 4 * PAGE)


@pytest.mark.parametrize("tokens", [1, 23 * PAGE - 1])
def test_a_prompt_is_whole_on_the_device(tokens: int) -> None:
    judge = admission()
    verdict = judge.judge(Arrival("a", [5] * tokens, None))
    assert verdict.refusal is None
    assert verdict.longest_answer == 23 * PAGE - tokens, "after a retraction it must fit, too"
    found = judge.choose(Prompt("a", verdict.options, tokens, np.zeros(0, dtype=np.int64)), 0, [], 4 * PAGE)
    assert found is not None
    assert (found.how, found.demand, found.chunk_tokens) == (IN_PLACE, -(-tokens // PAGE), None)
    assert judge.longest(verdict.options) == 23 * PAGE - 1


def test_a_prompt_longer_than_the_device_pool_is_refused() -> None:
    verdict = admission().judge(Arrival("a", [5] * 23 * PAGE, None))
    assert verdict.refusal == (
        "The prompt has 5888 tokens (23 pages of KV); prompts of this model are whole on the device while they are "
        "computed, and the device pool takes fewer than 5888. Shorten the prompt, or start the server with a larger "
        "--lsa-device-tokens."
    )


def test_a_prompt_that_has_no_room_now_waits_and_is_never_streamed() -> None:
    judge = admission()
    options = judge.options({"lsa": {"prefill": "resident"}})
    judge.pager.ledger.allocate(range(1, 31))
    assert judge.pager.hold("other", range(1, 21))
    assert judge.choose(Prompt("a", options, 8 * PAGE, np.arange(21, 28)), 1, [], 4 * PAGE) is None
    judge.pager.forget("other")
    judge.pager.ledger.release(range(1, 21))
    found = judge.choose(Prompt("a", options, 8 * PAGE, np.arange(21, 28)), 1, [], 4 * PAGE)
    assert found is not None and found.how == IN_PLACE


# --- the engine over such a layout -----------------------------------------------------------------------------------


class WholePrompts(MhaLayout):
    """Has KV that the simulation can read, and prompts that are whole on the device."""

    whole_prompts = True


@pytest.mark.parametrize("part", range(2))
def test_nothing_is_read_wrong_lost_or_left(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "MhaLayout", WholePrompts)
    for seed in range(part, 40, 2):
        failure, counts = failure_of(seed, page=PAGE)
        assert failure is None, failure
        assert not counts["streamed"]


# --- what a server accepts, and SGLang's own pools -------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process for all: SGLang takes its time to be imported."""
    folder = write_config(tmp_path_factory.mktemp("dsv4"))
    run = subprocess.run([sys.executable, str(START), str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    answers: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("flags", ["tiny", "policy", "full", "other page", "layers", "groups auto"])
def test_what_is_served(flags: str, started: dict[str, Any]) -> None:
    told = started["flags"][flags]
    assert "problems" not in told, told
    assert (told["page_size"], told["attention_backend"], told["kv_cache_dtype"]) == (256, "dsv4", "fp8_e4m3")
    assert told["prefill_attention_backend"] is None
    assert told["radix_cache_backend"] == "lsa"
    assert (told["groups"], told["group_margin"]) == (False, 0.0)
    expected = {"policy": "random", "full": FULL}.get(flags, needed(LSAConfig(), index=True)[0].name)
    assert told["policy"] == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "other attention",
            "--decode-attention-backend fa3: not supported with LSA and DeepseekV4ForCausalLM yet",
        ),
        (
            "not here yet",
            "--prefill-attention-backend fa3: not supported with LSA and DeepseekV4ForCausalLM yet: leave the flag out",
        ),
        ("bfloat16", "--kv-cache-dtype bfloat16: not supported with LSA and DeepseekV4ForCausalLM yet: leave"),
        ("hisparse", "--enable-hisparse True: not supported with LSA yet: remove --enable-hisparse"),
        ("hicache", "--enable-hierarchical-cache True: not supported with LSA yet: remove"),
        ("tp", "--tp-size 2: not supported with LSA and DeepseekV4ForCausalLM yet: use --tp-size 1"),
        ("mixed", "--enable-mixed-chunk True: not supported with LSA yet: remove"),
        ("groups", "groups: not supported with LSA and DeepseekV4ForCausalLM yet: leave it out"),
        ("resident", "--lsa-prefill resident: not supported with LSA and DeepseekV4ForCausalLM yet: use exact"),
        (
            "quest",
            "--lsa-policy quest: DeepseekV4ForCausalLM shows no queries and keys of attention: use one of nat",
        ),
        ("indices", "--enable-return-indexer-topk True: not supported with LSA and DeepseekV4ForCausalLM yet: remove"),
        ("no index there", "--lsa-observe-layers names layer 2, which has no index: use some of 1, 3, 5"),
        ("recorded", "--lsa-record /nowhere/at/all: not supported with LSA and DeepseekV4ForCausalLM yet"),
    ],
)
def test_what_is_refused(flags: str, words: str, started: dict[str, Any]) -> None:
    assert started["flags"][flags]["problems"][0].startswith(words)


def test_a_pool_of_sglangs_own_has_the_planned_rows(started: dict[str, Any]) -> None:
    built = started["built"]
    physical, virtual = built["physical"], built["virtual"]
    assert built["slots"] == [virtual * PAGE, built["window"]]
    assert (physical, virtual) == (64, int(0.02 * GB) // PAGE_BYTES - 1)
    assert built["rows"] == {
        "entries": [[physical + 1, KV_ROW]] * 3,
        "index": [[physical + 1, INDEX_ROW]] * 3,
        "c128": [[virtual + 1, 1_728]] * 2,
    }
    assert built["layers"] == list(C4_LAYERS)
    assert built["page_bytes"] == PAGE_BYTES
    assert built["same memory"] and built["window is stock"]
    assert built["index heads"] == [64, 128, 4096]


def test_status_says_what_was_planned(started: dict[str, Any]) -> None:
    built = started["built"]
    status, planned = built["status"], built["planned"]
    assert (status["page_size"], status["page_bytes"]) == (256, PAGE_BYTES)
    overhead = status["physical"]["overhead_bytes"]
    for name in (*beside(2), "page_keys", "queries", "staging", "graph_indices"):
        assert overhead[name] == planned[name], name
    assert overhead["staging"] == overhead["graph_indices"] == 0
    assert overhead["page_keys"] == (built["virtual"] + 1) * 3 * INDEX_ROW


def test_the_architecture_is_known_before_sglang_reads_it(tmp_path: pathlib.Path) -> None:
    folder = write_config(tmp_path / "model")
    assert named_architecture({"model_path": str(folder)}) == "DeepseekV4ForCausalLM"
    (folder / "config.json").write_text("{")
    assert named_architecture({"model_path": str(folder)}) is None
    (folder / "config.json").write_text("[]")
    assert named_architecture({"model_path": str(folder)}) is None
    for path in (str(tmp_path / "nothing"), "no/such/name/as/this", "nobody/has-this", None):
        assert named_architecture({"model_path": path}) is None


def test_defaults_of_dense_models_are_not_those_of_this_one(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    """On a GPU that has FlashAttention-3, which a dense model's prompts are then read with."""
    monkeypatch.setattr(compatibility, "_cuda", lambda: True)
    monkeypatch.setattr(compatibility, "flash_attention_problem", lambda arguments: None)
    values: dict[str, Any] = {"device": "cuda", "model_path": str(write_config(tmp_path / "model"))}
    given = dict(values)
    compatibility.apply_defaults(values, LSAConfig())
    assert values == {**given, "radix_cache_backend": "lsa", "max_running_requests": 256}
    dense: dict[str, Any] = {"device": "cuda", "model_path": str(tmp_path)}
    compatibility.apply_defaults(dense, LSAConfig())
    assert dense["prefill_attention_backend"] == "fa3" and dense["page_size"] == 64
