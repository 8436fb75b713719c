"""What ranks that share a model's heads do with their scores: all choose by the same ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.choose import choose
from sglang_lsa.engine.deferred_scores import Fetch
from sglang_lsa.engine.policies import REGISTRY
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.scores import Reduction, Scores

LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 8, 4, 6
PAGES, TOKENS = 12, 12 * PAGE_SIZE
RANKS = 2


class Ranks:
    """As many ranks as there are threads, which meet when all of them have their scores."""

    def __init__(self, count: int):
        self.meeting = Barrier(count, timeout=60)
        self.parts: list[np.ndarray | torch.Tensor] = [torch.zeros(0)] * count
        self.asked: list[Reduction] = []

    def door(self, rank: int) -> Scores:
        ranks = self

        class Door(Scores):
            def reduce(self, scores: np.ndarray | torch.Tensor, how: Reduction) -> np.ndarray | torch.Tensor:
                ranks.asked.append(how)
                if how is Reduction.SAME:
                    return scores
                assert isinstance(scores, torch.Tensor), "still where it was computed"
                ranks.parts[rank] = scores
                ranks.meeting.wait()
                parts = torch.stack([torch.as_tensor(part) for part in ranks.parts])
                return parts.amax(dim=0) if how is Reduction.MAX else parts.sum(dim=0)

        return Door()


def rank_of(rank: int, ranks: int, scores: Scores | None = None) -> LSARuntime:
    """A rank with its part of the heads of one model, which has seen its part of one prompt."""
    chance = torch.Generator().manual_seed(7)
    slots = (PAGES + 1) * PAGE_SIZE
    keys = [torch.randn(slots, KV_HEADS, DIM, generator=chance) for _ in range(LAYERS)]
    queries = [torch.randn(TOKENS, Q_HEADS, DIM, generator=chance) for _ in range(LAYERS)]
    own = [pool.chunk(ranks, dim=1)[rank].contiguous() for pool in keys]
    pager = Pager(MhaLayout(own, [torch.zeros_like(pool) for pool in own], PAGE_SIZE), 2 * PAGES)
    config = LSAConfig(observe_layers=(0, 1), query_tokens=8, min_context=256, min_pages=2, recent_pages=1)
    rows = torch.zeros((3, TOKENS + PAGE_SIZE), dtype=torch.int32)
    runtime = LSARuntime(config, pager, rows, Q_HEADS // ranks, DIM**-0.5, scores=scores)
    pages = np.arange(1, PAGES + 1)
    pager.ledger.allocate(pages)
    assert pager.hold("a", pages)
    runtime._remember(pages)
    last = torch.arange(TOKENS - 8, TOKENS)
    for layer in range(LAYERS):
        seen = queries[layer].chunk(ranks, dim=1)[rank].contiguous()[last]
        runtime.observer.observe(layer, seen, torch.ones_like(last), last)
    return runtime


def score(runtime: LSARuntime, policy: str = "quest") -> Fetch:
    request = Request("a", 1, Asked(policy, 0.5), tokens=TOKENS, prompt_tokens=TOKENS)
    request.pages = np.arange(1, PAGES + 1)
    return runtime.lookahead.scorer.score(request, PAGES)


def test_ranks_with_half_of_the_heads_score_as_one_with_all() -> None:
    """And without agreeing they do not."""
    ranks = Ranks(RANKS)
    servers = [rank_of(rank, RANKS, ranks.door(rank)) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        fetched = list(pool.map(score, servers))
    whole, alone = score(rank_of(0, 1)).values(), score(rank_of(0, RANKS)).values()
    assert ranks.asked == [Reduction.MAX] * RANKS
    for server, fetch in zip(servers, fetched, strict=True):
        assert not fetch.failed
        np.testing.assert_allclose(fetch.values(), whole, rtol=1e-6)
        sets = [choose(server.lookahead.rules, found, PAGES, 0.5).positions for found in (fetch.values(), whole)]
        assert sets[0].tolist() == sets[1].tolist()
    assert not np.allclose(alone, whole, rtol=1e-2)


@pytest.mark.parametrize("policy", ["recency", "random"])
def test_what_every_rank_has_is_not_exchanged(policy: str) -> None:
    ranks = Ranks(RANKS)
    fetch = score(rank_of(0, RANKS, ranks.door(0)), policy)
    assert (ranks.asked, fetch.failed, len(fetch.values())) == ([Reduction.SAME], False, PAGES)


def test_a_policy_that_failed_has_nothing_to_agree_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(RANKS)
    runtime = rank_of(0, RANKS, ranks.door(0))
    monkeypatch.setattr(type(runtime.policies["quest"]), "score", lambda *_: torch.zeros(1))
    assert score(runtime).failed
    assert ranks.asked == [], "not with so many scores"


class Shared(Ranks):
    """Ranks of which each comes in any case, and says whether its policy failed."""

    def door(self, rank: int) -> Scores:
        door = super().door(rank)
        door.shared = True
        return door


@pytest.mark.parametrize("failed", [(), (1,), (0, 1)])
def test_a_policy_that_fails_on_one_rank_has_failed_on_all(failed: tuple[int, ...]) -> None:
    ranks = Shared(RANKS)
    servers = [rank_of(rank, RANKS, ranks.door(rank)) for rank in range(RANKS)]
    for rank in failed:
        servers[rank].policies["quest"].score = lambda *_: torch.zeros(1)  # type: ignore[method-assign]
    with ThreadPoolExecutor(RANKS) as pool:
        fetched = list(pool.map(score, servers))
    whole = score(rank_of(0, 1)).values()
    expected = np.arange(1, PAGES + 1) / PAGES if failed else whole
    for server, fetch in zip(servers, fetched, strict=True):
        np.testing.assert_allclose(fetch.values(), expected, rtol=1e-6)
        assert fetch.failed == bool(failed)
        np.testing.assert_array_equal(fetch.values(), fetch.values())
        assert server.lookahead.counts.fallbacks == bool(failed)


def test_what_the_policies_ask_for() -> None:
    asked = {name: policy.across_ranks for name, policy in REGISTRY.items()}
    same = Reduction.SAME
    dense = {"indexer": Reduction.SUM, "quest": Reduction.MAX, "recency": same, "random": same}
    own_index = {"native": same, "retriever": same}  # which every rank has whole
    assert asked == dense | own_index


def test_one_rank_has_what_it_scored() -> None:
    scores = torch.rand(3)
    for how in Reduction:
        assert Scores().reduce(scores, how) is scores
