"""Two ranks in a simulated server decide the same, whatever their GPUs and heads do; and that it would be found."""

from __future__ import annotations

import collections
from typing import Any

import pytest
from simulated_ranks import LateCopies, RankSimulation, failures_of
from simulation import Scores, Simulation

from sglang_lsa.engine.deferred_scores import Fetch
from sglang_lsa.engine.score import Scorer
from sglang_lsa.memory import ranks
from sglang_lsa.memory.progress import Done

Kinds = tuple[type[Simulation], ...]
EQUAL: Kinds = (RankSimulation, RankSimulation)
ONE_LATE: Kinds = (RankSimulation, LateCopies)
SEEDS = range(14)


def failures(seeds: range, kinds: Kinds) -> list[str]:
    """What goes wrong with the first of these seeds with which something does."""
    return next((failures for seed in seeds if (failures := failures_of(seed, kinds)[0])), [])


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(EQUAL, id="two"),
        pytest.param(ONE_LATE, id="one is late"),
        pytest.param(EQUAL + ONE_LATE, id="four", marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_same_records_after_every_step(kinds: Kinds) -> None:
    """Copies and passes end at other times on each, scores are of other heads, and policies fail on one of them."""
    total = collections.Counter[str]()
    for seed in SEEDS:
        found, counts = failures_of(seed, kinds)
        assert not found, "\n".join(found)
        total += counts
    for what in ("retracted", "preempted", "aborted in a prompt", "aborted in the queue", "evicted", "recalled"):
        assert total[what] > 0, (what, total)
    for what in ("streamed", "resident", "shrunk", "stalls", "score pages", "agree on what is finished"):
        assert total[what] > 0, (what, total)
    assert total["compare records"] > 1500


@pytest.mark.parametrize(
    "kinds", [pytest.param(EQUAL, id="two", marks=pytest.mark.slow), pytest.param(ONE_LATE, id="one is late")]
)
def test_ranks_have_the_same_sets_where_these_are_as_large_as_they_need_to_be(kinds: Kinds) -> None:
    total = collections.Counter[str]()
    for seed in range(100, 110):
        found, counts = failures_of(seed, kinds, auto=True)
        assert not found, "\n".join(found)
        total += counts
    for what in ("recalled", "shrunk", "streamed", "score pages", "agree on what is finished"):
        assert total[what] > 0, (what, total)


@pytest.mark.parametrize("kinds", [EQUAL, ONE_LATE], ids=["two", "one is late"])
def test_ranks_have_the_same_sets_where_these_are_chosen_for_a_group(kinds: Kinds) -> None:
    """Who is in a group, and which pages its others read or read next, is the same on each."""
    total = collections.Counter[str]()
    for seed in range(13, 21, 2):
        found, counts = failures_of(seed, kinds, groups=True)
        assert not found, "\n".join(found)
        total += counts
    assert total["read in groups"] > 100 and total["exchanged"] > 20 and total["retracted"], total


def test_it_finds_ranks_that_size_sets_by_their_own_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(self: Any, scores: Any, how: Any) -> Any:
        return scores

    monkeypatch.setattr(ranks._AllHeads, "reduce", own)
    found = next((found for seed in range(100, 110) if (found := failures_of(seed, EQUAL, auto=True)[0])), [])
    assert "ranks have different records" in "".join(found)


def test_it_finds_ranks_that_do_not_agree_on_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(self: Any, seen: Done) -> Done:
        return seen

    monkeypatch.setattr(ranks._SlowestCounts, "agreed", own)
    assert "different" in "".join(failures(SEEDS, ONE_LATE))


def test_it_finds_ranks_that_score_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(self: Any, scores: Any, how: Any) -> Any:
        return scores

    monkeypatch.setattr(ranks._AllHeads, "reduce", own)
    assert "ranks have different records" in "".join(failures(SEEDS, EQUAL))


def test_it_finds_a_policy_that_fails_on_one_rank_and_keeps_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raised before it came to where the others wait."""
    shared, score = Scorer._shared, Scores.score
    own: dict[Any, Any] = {}

    def eager(self: Scorer, name: str, requests: Any, pages: Any) -> Any:
        policy = self.policies[name]
        if isinstance(policy, Scores):
            try:
                own[policy] = {one.key: score(policy, one, of_it) for one, of_it in zip(requests, pages, strict=True)}
            except RuntimeError:
                return [Fetch.of(self.stands_in.score(*one)) for one in zip(requests, pages, strict=True)]
        return shared(self, name, requests, pages)

    monkeypatch.setattr(Scorer, "_shared", eager)
    monkeypatch.setattr(Scores, "score", lambda self, request, pages: own[self][request.key])
    assert "come together for different things" in "".join(failures(SEEDS, EQUAL))
