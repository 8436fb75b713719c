"""What ranks that share a model's heads do with their scores: all choose by the same ones."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.choose import choose
from sglang_lsa.engine.deferred_scores import Fetch
from sglang_lsa.engine.policies import REGISTRY, Quest
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.indexer.checkpoint import IndexerConfig, ModelShape
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.kernels.project_queries import project_queries
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


def rank_of(rank: int, ranks: int, scores: Scores | None = None, **options: object) -> LSARuntime:
    """A rank with its part of the heads of one model, which has seen its part of one prompt."""
    chance = torch.Generator().manual_seed(7)
    slots = (PAGES + 1) * PAGE_SIZE
    keys = [torch.randn(slots, KV_HEADS, DIM, generator=chance) for _ in range(LAYERS)]
    queries = [torch.randn(TOKENS, Q_HEADS, DIM, generator=chance) for _ in range(LAYERS)]
    own = [pool.chunk(ranks, dim=1)[rank].contiguous() for pool in keys]
    pager = Pager(MhaLayout(own, [torch.zeros_like(pool) for pool in own], PAGE_SIZE), 2 * PAGES)
    defaults = {
        "observe_layers": (0, 1),
        "query_tokens": 8,
        "min_context": 256,
        "min_pages": 2,
        "floor_tokens": 0,
        "recent_pages": 1,
    }
    config = LSAConfig(**{**defaults, **options})
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
    monkeypatch.setattr(type(runtime.policies["quest"]), "score_all", lambda *_: torch.zeros(1))
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


# --- several requests at once ----------------------------------------------------------------------------------------


def several(runtime: LSARuntime, *asked: str) -> tuple[list[Request], list[int]]:
    """Requests with such policies, in rows of their own; of different lengths, and observed for different times."""
    chance = np.random.default_rng(5)
    requests, complete = [], []
    for number, policy in enumerate(asked):
        pages = int(chance.integers(0, PAGES + 1)) if number else PAGES
        request = Request(f"r{number}", 1 + number % 2, Asked(policy, 0.5), tokens=TOKENS - number)
        request.first_observed = 0 if number % 3 else max(0, request.tokens - int(chance.integers(0, 8)))
        request.pages = chance.permutation(np.arange(1, PAGES + 1))[:pages]
        requests.append(request)
        complete.append(pages)
    return requests, complete


@pytest.fixture
def with_indexer(tmp_path: pathlib.Path) -> LSARuntime:
    """A server that offers all policies of a dense model, and has seen a prompt in each of two rows."""
    shape = ModelShape(64, LAYERS, Q_HEADS, KV_HEADS, DIM)
    made = MemoryIndexer(IndexerConfig(shape, ((0, 1), (1, 0), (1, 7)), sub_keys=4, key_dim=4, positions=8, overlap=2))
    for number, parameter in enumerate(made.requires_grad_(False).parameters()):
        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3
    made.save(tmp_path)
    runtime = rank_of(0, 1, indexer=str(tmp_path), observe_layers=None)
    runtime.observer.buffer[2] = runtime.observer.buffer[1].flip(0) * 1.5
    return runtime


MIXED = ("quest", "indexer", "random", "quest", "recency", "indexer", "indexer", "quest", "quest", "indexer")


def test_scores_of_many_are_those_of_each(with_indexer: LSARuntime) -> None:
    """Bit for bit, whatever policy they ask, however long they are, and however much of them was observed."""
    requests, complete = several(with_indexer, *MIXED)
    scorer = with_indexer.lookahead.scorer
    alone = [scorer.score(*one).values() for one in zip(requests, complete, strict=True)]
    for found, expected in zip(scorer.score_all(requests, complete), alone, strict=True):
        assert not found.failed
        np.testing.assert_array_equal(found.values(), expected)
    assert {len(own) for own in alone} >= {0, PAGES}, "of no pages, too"
    assert scorer.score_all([], []) == []


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_an_indexer_asks_for_as_many_requests_at_a_time_as_fit(
    with_indexer: LSARuntime, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU; here the kernels' references, which also say what each request gets."""
    indexer, policy = with_indexer.indexer.indexer, with_indexer.indexer
    ring = policy.observer.buffer
    requests, complete = several(with_indexer, *["indexer"] * 10)
    asked = policy.observer.asked(requests, [one.pages[:pages] for one, pages in zip(requests, complete, strict=True)])
    expected = indexer.score_by_kernels(ring, policy.table, asked)
    alone = [indexer.score_part(asked.recent(ring, i), policy.table, asked.pages_of(i)) for i in range(10)]
    torch.testing.assert_close(expected, torch.cat(alone), rtol=0.02, atol=0)  # queries are bfloat16 there
    each, most = len(indexer.q_at) * ring.shape[1] * indexer.config.key_dim * 6, []

    def projected(*given: torch.Tensor) -> torch.Tensor:
        most.append(len(given[1]))
        return project_queries(*given)

    monkeypatch.setattr("sglang_lsa.indexer.model.project_queries", projected)
    monkeypatch.setattr("sglang_lsa.kernels.page_score.PARTIAL_BYTES", each * at_once)
    found = indexer.score_by_kernels(ring, policy.table, asked)
    assert sum(most) == 10 and max(most) == min(at_once, 10)
    assert torch.equal(found, expected)


def test_requests_of_a_policy_are_scored_by_one_call(with_indexer: LSARuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name, kernel in (
        ("quest", "policies.quest.bound_scores"),
        ("indexer", "policies.indexer.MemoryIndexer.score_parts"),
    ):
        monkeypatch.setattr(
            f"sglang_lsa.engine.{kernel}",
            lambda *given, name=name: (
                calls.append(name) or torch.zeros(sum(given[-2 if name == "quest" else -1].sizes))
            ),
        )
    with_indexer.lookahead.scorer.score_all(*several(with_indexer, *MIXED))
    assert calls == ["quest", "indexer"]


@pytest.mark.parametrize("which", ["quest", "indexer"])
def test_a_request_that_cannot_be_scored_fails_alone(
    which: str, with_indexer: LSARuntime, caplog: pytest.LogCaptureFixture
) -> None:
    requests, complete = several(with_indexer, *MIXED)
    scorer, broken = with_indexer.lookahead.scorer, MIXED.index(which)
    expected = [scorer.score(*one).values() for one in zip(requests, complete, strict=True)]
    requests[broken].row = 77
    expected[broken] = np.arange(1, complete[broken] + 1) / max(1, complete[broken])
    before = with_indexer.lookahead.counts.fallbacks
    found = scorer.score_all(requests, complete)
    for index, fetch in enumerate(found):
        assert fetch.failed == (index == broken)
        np.testing.assert_array_equal(fetch.values(), expected[index])
    assert with_indexer.lookahead.counts.fallbacks == before + 1
    assert f"scoring {requests[broken].rid} with {which} failed" in caplog.text


@pytest.mark.parametrize("failed", [(), (1,), (0, 1)])
def test_ranks_come_together_once_for_all_requests(failed: tuple[int, ...]) -> None:
    """And a policy that cannot score one request on one of them has failed for that one, on all of them."""
    ranks = Shared(RANKS)
    servers = [rank_of(rank, RANKS, ranks.door(rank)) for rank in range(RANKS)]
    given = [several(server, *["quest"] * 4) for server in servers]
    for rank in failed:
        given[rank][0][2].row = 77
    with ThreadPoolExecutor(RANKS) as pool:
        fetched = list(
            pool.map(lambda one: one[0].lookahead.scorer.score_all(*one[1]), zip(servers, given, strict=True))
        )
    assert ranks.asked == [Reduction.MAX] * RANKS
    whole = rank_of(0, 1)
    requests, complete = several(whole, *["quest"] * 4)
    for index in range(4):
        expected = whole.lookahead.scorer.score(requests[index], complete[index]).values()
        if failed and index == 2:
            expected = np.arange(1, complete[2] + 1) / max(1, complete[2])
        for server, found in zip(servers, fetched, strict=True):
            np.testing.assert_allclose(found[index].values(), expected, rtol=1e-6)
            assert found[index].failed == bool(failed and index == 2)
            assert server.lookahead.counts.fallbacks == bool(failed and index >= 2)


class Halved(Quest):
    """An extension's: it changes what one request gets, and does not know of several."""

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        return super().score(request, pages) / 2


class Finished(Halved):
    def finish(self, scores: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
        return scores - scores[:1]

    def score_all(self, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> torch.Tensor:
        return Quest.score_all(self, requests, pages) / 2


@pytest.mark.parametrize("kind", [Halved, Finished])
def test_policies_of_extensions_are_asked_as_they_say(kind: type[Quest]) -> None:
    runtime = rank_of(0, 1)
    policy = runtime.policies["quest"]
    assert isinstance(policy, Quest) and policy.together("score")
    made = kind(policy.observer, policy.keys, policy.scale)
    assert (made.together("score"), made.together("finish")) == (kind is Finished, kind is Halved)
    runtime.lookahead.scorer.policies = {"quest": made}
    requests, complete = several(runtime, *["quest"] * 4)
    for found, request in zip(runtime.lookahead.scorer.score_all(requests, complete), requests, strict=True):
        scores = policy.score(request, request.pages) / 2
        np.testing.assert_array_equal(found.values(), (scores - scores[:1] if kind is Finished else scores).numpy())
