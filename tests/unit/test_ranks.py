"""Ranks that share a model's heads: what they agree on, and what becomes of disagreement."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.deferred_scores import wait_for
from sglang_lsa.engine.sizing import MemoryPlan, Needs, plan_memory
from sglang_lsa.indexer.checkpoint import IndexerConfig, ModelShape
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.kernels.page_score import to_8_bits
from sglang_lsa.memory.layout.base import PageShape
from sglang_lsa.memory.layout.mha import mha_shape
from sglang_lsa.memory.ledger import Ledger, LedgerError
from sglang_lsa.memory.mirror import HostMirror
from sglang_lsa.memory.numa import nodes_of, spread
from sglang_lsa.memory.ranks import Ranks, RanksDisagree
from sglang_lsa.memory.unheld import forget_unheld
from sglang_lsa.patches import compatibility
from sglang_lsa.patches import kv_cache_configurator_config_from_budget as config_from_budget
from sglang_lsa.patches import model_runner_load_model as load_model

SIZE = 2


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.support.joined_ranks"]
    started = [subprocess.Popen([*command, str(rank), str(SIZE), str(folder)]) for rank in range(SIZE)]
    try:
        assert [process.wait(timeout=120) for process in started] == [0] * SIZE
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize(
    ("what", "agreed"),
    [
        ("every", ["rank 0", "rank 1"]),
        ("max", [1.0, 1.0, -1.0]),
        ("sum", [2.0, 1.0, -3.0]),
        ("began", "began"),
    ],
)
def test_what_ranks_agree_on(met: list[dict[str, Any]], what: str, agreed: Any) -> None:
    assert [seen[what] for seen in met] == [agreed, agreed]


def test_finished_is_what_is_finished_everywhere(met: list[dict[str, Any]]) -> None:
    assert [seen["done"] for seen in met] == [[7, 3, 8], [7, 3, 8]]
    assert [seen["done after restart"] for seen in met] == [[5, 1, 1], [105, 1, 1]], "by counts of their own"


def test_memory_that_runs_out_on_one_rank_has_run_out_on_all(met: list[dict[str, Any]]) -> None:
    assert [seen["one failed"] for seen in met] == [
        "another rank could not begin this pass, see its log",
        "all of it is gone",
    ]


def test_a_failure_elsewhere_ends_the_server(met: list[dict[str, Any]]) -> None:
    for seen in met:
        assert seen["elsewhere"].startswith("LSA: ranks failed in different places, so the server ends: rank 0: ValueE")


def test_other_records_end_the_server_and_both_are_told(met: list[dict[str, Any]]) -> None:
    for seen in met:
        assert seen["records"].startswith("LSA: ranks have different records (check 2); the server ends")
        assert seen["records"].endswith("\nrank 0: records of 0\nrank 1: records of 1")


def test_a_rank_that_fails_alone_says_so_and_does_not_hang(met: list[dict[str, Any]]) -> None:
    assert met[1]["alone"].startswith("LSA: rank 1 of 2 failed where others went on (lost its way)")


def test_waiting_for_scores_ends_and_says_who_waited() -> None:
    never = SimpleNamespace(query=lambda: False)
    with pytest.raises(RanksDisagree, match="LSA: rank 1 of 2 waited 0 s for the other ranks to score pages"):
        wait_for(never, "rank 1 of 2", timeout=0.01)
    wait_for(SimpleNamespace(query=lambda: True), "nobody", timeout=0.0)


def test_one_rank_agrees_with_itself() -> None:
    ranks = Ranks()
    assert (ranks.size, ranks.rank, ranks.local, ranks.scores.shared) == (1, 0, 1, False)
    assert ranks.every(3, "count") == [3]
    assert [ranks.any(failed, "begin") for failed in (False, True)] == [False, True]
    ranks.failed_together("anything")
    ranks.compare(1, lambda: "never asked")
    assert ranks.checks == 0


def test_what_nobody_holds_is_forgotten() -> None:
    ledger = Ledger(12, 6)
    ledger.allocate(range(1, 9))
    for holder, pages in (("a", [1, 2, 3]), ("b", [4, 5])):
        assert ledger.hold(holder, pages) is not None
    ledger.mirrored([1, 2, 3, 4])
    number = ledger.forward_started()
    with pytest.raises(LedgerError, match="in flight"):
        forget_unheld(ledger)
    ledger.forward_finished(number)
    ledger.drop("a", [2, 3])
    ledger.read_next(np.array([3]))
    forget_unheld(ledger)
    assert ledger.on_device(range(1, 9)).tolist() == [True, False, False, True, True, False, False, False]
    assert ledger._free == sorted(ledger._free, reverse=True)
    ledger.check()


# one size for all


PAGE = mha_shape(PAGE_SIZE, 2, 2, 8, 8, 2)
NEEDS = Needs(rows=3, graph_batches=(), context_tokens=4096, page=PAGE_SIZE, page_key_bytes=16, row_bytes=16)


def plan_of(physical: int, virtual: int, page: PageShape = PAGE) -> MemoryPlan:
    return MemoryPlan(physical, virtual, page, NEEDS.overhead(LSAConfig(), physical, virtual))


class Told(Ranks):
    """Rank 0 of two, and what the other one brings."""

    def __init__(self, other: Any):
        super().__init__(2, 0, 2)
        self.other = other

    def every(self, value: Any, what: str) -> list[Any]:
        return [value, self.other]


def agreed(monkeypatch: pytest.MonkeyPatch, own: MemoryPlan, other: Any) -> MemoryPlan:
    monkeypatch.setattr(config_from_budget, "plan_memory", lambda config, **sizes: own)
    return config_from_budget.agreed_plan(LSAConfig(), Told(other), NEEDS, {})


def test_sizes_are_what_all_ranks_have_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = agreed(monkeypatch, plan_of(640, 6400), (None, plan_of(1280, 2560)))
    assert made == plan_of(640, 2560)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("the mirror is too small", None), "rank 1: the mirror is too small"),
        ((None, plan_of(640, 6400, mha_shape(PAGE_SIZE, 3, 2, 8, 8, 2))), "ranks have pages of different shapes"),
    ],
)
def test_ranks_that_cannot_serve_together_are_refused(other: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=words):
        agreed(monkeypatch, plan_of(640, 6400), other)


def test_ranks_with_different_options_are_refused_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    server_args = SimpleNamespace(lsa_config=LSAConfig(), tp_size=2)
    runner = SimpleNamespace(ps=SimpleNamespace(tp_size=2), server_args=server_args)  # as either release has it
    for other in (LSAConfig(), LSAConfig(budget=0.5)):
        monkeypatch.setattr(load_model, "ranks", lambda size, other=other: Told(repr(other)))
        refused = pytest.raises(ValueError, match=r"rank 0 has LSAConfig.*, rank 1 has .*budget=0.5.*the same flags")
        with refused if other.budget == 0.5 else nullcontext():
            load_model.compare_options(runner)
    runner.ps.tp_size = server_args.tp_size = 1
    load_model.compare_options(runner)  # has nobody to ask


def test_the_host_is_shared_by_its_ranks() -> None:
    sizes = {"page": PAGE, "budgeted_tokens": 1 << 30, "context_tokens": 640, "device": "cpu"}
    config = LSAConfig(host_memory_gb=0.125, device_tokens=640)
    one, two = (plan_memory(config, **sizes, local_ranks=ranks) for ranks in (1, 2))
    assert (two.virtual_tokens // PAGE_SIZE + 1) * 2 == one.virtual_tokens // PAGE_SIZE + 1


@pytest.mark.parametrize(
    ("ranks", "q_heads", "kv_heads", "record", "words"),
    [
        (1, 9, 3, True, ""),
        (2, 14, 2, False, ""),
        (4, 8, 2, False, ""),
        (2, 9, 3, False, "--tp-size 2: model has 9 attention heads, .* by 2 ranks: use --tp-size 1, 3"),
        (6, 12, 4, False, "has 4 KV heads, which can neither be shared by 6 ranks nor"),
        (16, 32, 8, False, "--tp-size 16: not supported with LSA yet: use 2 to 8"),
        (2, 8, 8, True, "--lsa-record with --tp-size 2"),
    ],
)
def test_heads_that_ranks_cannot_share(
    ranks: int, q_heads: int, kv_heads: int, record: bool, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = SimpleNamespace(num_attention_heads=q_heads, num_key_value_heads=kv_heads)
    hf_config = SimpleNamespace(architectures=["LlamaForCausalLM"])
    model = SimpleNamespace(model_path="model", hf_text_config=text, hf_config=hf_config)
    config = LSAConfig(record="/tmp/records" if record else None)
    found = compatibility.rank_problems(SimpleNamespace(tp_size=ranks), model, config)
    assert bool(found) == bool(words) and re.search(words, "\n".join(found))
    assert ("takes 2 times the memory" in caplog.text) == (kv_heads < ranks and not words)


# an indexer whose heads are shared out


def indexer(shape: ModelShape, heads: tuple[tuple[int, int], ...]) -> MemoryIndexer:
    made = MemoryIndexer(IndexerConfig(shape, heads, sub_keys=4, key_dim=8, overlap=2)).requires_grad_(False)
    chance = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter += torch.randn(parameter.shape, generator=chance) * 0.3
    return made


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "heads",
    [
        pytest.param(tuple((layer, head) for layer in (1, 3) for head in range(8)), id="all heads"),
        pytest.param(((1, 0), (1, 7), (3, 4), (3, 5)), id="some heads, none on some ranks"),
    ],
)
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_an_indexer_serves_any_number_of_ranks(ranks: int, heads: Any, kv_heads: int) -> None:
    """Each query head counts once, where KV heads are repeated, too."""
    shape, pages = ModelShape(64, 4, 8, kv_heads, 8), 10
    chance = torch.Generator().manual_seed(ranks)
    queries = torch.randn(5, 2, 8, 8, generator=chance)
    keys = torch.randn(pages + 1, PAGE_SIZE, 2, kv_heads, 8, generator=chance)
    whole, ids = indexer(shape, heads), torch.arange(1, pages + 1)
    expected = whole.score(queries, to_8_bits(whole.page_keys(keys)), ids)
    total, served, most = torch.zeros(pages), 0, 0
    for rank in range(ranks):
        part = whole.of_rank(rank, ranks)
        own_q = queries.chunk(ranks, dim=2)[rank]
        repeated = keys.repeat_interleave(max(1, ranks // kv_heads), dim=3)
        own_k = repeated.chunk(ranks, dim=3)[rank]
        total += part.score_part(own_q, to_8_bits(part.page_keys(own_k)), ids)
        served += len(part.q_at)
        assert len(part.k_at) * 4 * 8 <= whole.config.rank_page_bytes(ranks), "what was planned for"
        most = max(most, len(part.k_at) * 4 * 8)
    torch.testing.assert_close(whole.finish(total), expected, rtol=1e-5, atol=1e-6)
    assert served == len(heads)
    assert most == whole.config.rank_page_bytes(ranks)
    assert dataclasses.asdict(whole.config)["heads"] == heads and len(whole.q_at) == len(heads), "as it was"


def test_one_rank_has_the_indexer_itself(tmp_path: pathlib.Path) -> None:
    whole = indexer(ModelShape(64, 4, 8, 4, 8), ((1, 0), (3, 4)))
    assert whole.of_rank(0, 1) is whole


# where the mirror lies


MAPS = """\
7f0000000000 default anon=3 dirty=3 N0=3 kernelpagesize_kB=4
7f1000000000 bind:1 anon=768 dirty=768 N0=256 N1=512 kernelpagesize_kB=2048
7f2000000000 default file=/lib/x.so mapped=2 N1=2 kernelpagesize_kB=4
7f3000000000 default
"""


@pytest.mark.parametrize(
    ("address", "nodes", "words"),
    [
        (0x7F0000000000, {0: 3 << 12}, "node 0"),
        (0x7F1000000040, {0: 256 << 21, 1: 512 << 21}, "nodes 0 (33%) and 1 (67%)"),
        (0x7F3000000000, {}, ""),
        (0x100, {}, ""),
    ],
)
def test_nodes_on_which_memory_lies(address: int, nodes: dict[int, int], words: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "numa_maps").write_text(MAPS)
    assert nodes_of(address, tmp_path / "numa_maps") == nodes
    assert spread(address, tmp_path / "numa_maps") == words


def test_nodes_of_a_mirror() -> None:
    """As the system tells it; where it does not, nothing is said."""
    mirror = HostMirror(64, 1 << 20)
    mirror.pages.zero_()
    nodes = nodes_of(mirror.pages.data_ptr())
    assert sum(nodes.values()) >= mirror.nbytes if nodes else spread(mirror.pages.data_ptr()) == ""
