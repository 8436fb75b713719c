"""Sets that are chosen in one go are those that each request gets alone: pages, ranks and what is told, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine import choose_together
from sglang_lsa.engine.choose import Chosen, Rules
from sglang_lsa.engine.choose_together import Ask, choose_all
from sglang_lsa.indexer.expectation import Expectation

EXPECTATION = Expectation(((0.0, 0.0, 0.0), (0.5, 0.3, 0.1), (1.0, 1.0, 0.4)), "made up")


def told(found: Chosen) -> dict[str, Any]:
    """Everything, in a form that says what differs."""
    pages, ranks = found.positions, found.ranks
    arrays = {"positions": (pages.dtype, pages.tolist()), "ranks": (ranks.dtype, ranks.tobytes(), ranks.tolist())}
    rest = {name: (type(value), value) for name, value in vars(found).items() if name not in arrays}
    return arrays | rest


def rules_of(chance: np.random.Generator) -> Rules:
    config = LSAConfig(
        budget=0.02,
        min_pages=int(chance.choice([1, 4, 8])),
        floor_tokens=0,
        sink_pages=int(chance.choice([0, 1, 3])),
        recent_pages=int(chance.choice([1, 4])),
        prompt_pages=int(chance.choice([0, 2])),
        threshold=[None, 0.0, 0.5][chance.integers(3)],
        fallback_budget=[None, 0.5][chance.integers(2)],
        min_coverage=float(chance.choice([0.3, 0.9])),
    )
    largest = float(chance.choice([9, 40, 10_000]))
    return Rules(config, largest, {"indexer": 0.1, "shares": -np.inf}, {"indexer": EXPECTATION})


def scores_of(chance: np.random.Generator, pages: int, dtype: Any) -> np.ndarray:
    what = chance.integers(7)
    scores = chance.random(pages)
    if what == 1:
        scores = scores.round(1)  # ties
    elif what == 2:
        scores[:] = chance.choice([0.0, 0.7, -np.inf, np.nan])
    elif what == 3:
        scores[chance.random(pages) < 0.5] = np.nan
    elif what == 4:
        scores[chance.random(pages) < 0.9] = -np.inf
    elif what == 5:
        scores = np.exp(chance.normal(0, 4, pages)) - 1.0
    elif what == 6:
        scores[chance.random(pages) < 0.2] = np.inf
    return (np.nan_to_num(scores, posinf=9, neginf=-9) if dtype is np.int64 else scores).astype(dtype)


def ask_of(chance: np.random.Generator) -> Ask:
    complete = int(chance.choice([chance.integers(1, 12), chance.integers(12, 70), 64, 127, 128]))
    context = complete + int(chance.integers(2))
    rare = chance.random() < 0.3
    upcoming = np.sort(chance.permutation(complete)[: chance.integers(0, 4) if chance.random() < 0.4 else 0])
    return Ask(
        scores_of(chance, complete, chance.choice([np.float32, np.float32, np.float32, np.float64, np.int64])),
        context,
        float(chance.choice([0.02, 0.135, 0.3, 1.0])),
        str(chance.choice(["", "quest", "indexer", "shares"])),
        int(chance.integers(0, context + 1)),
        upcoming,
        float(chance.choice([1.5, 4.0])) if rare else 1.0,
        int(chance.integers(0, complete)) if rare and chance.random() < 0.6 else None,
        float(chance.choice([0.05, 0.2, 0.39])) if chance.random() < 0.3 else None,
    )


@pytest.mark.parametrize("fewest", [1, choose_together.FEWEST])
@pytest.mark.parametrize("seed", range(40))
def test_each_gets_what_it_gets_alone(seed: int, fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever policies, options, lengths, and types of scores are together."""
    monkeypatch.setattr(choose_together, "FEWEST", fewest)
    chance = np.random.default_rng(seed)
    for _ in range(12):
        rules, asks = rules_of(chance), [ask_of(chance) for _ in range(chance.integers(0, 24))]
        before = [ask.scores.copy() for ask in asks]
        found = choose_all(rules, asks)
        assert len(found) == len(asks)
        for ask, its, scores in zip(asks, found, before, strict=True):
            np.testing.assert_array_equal(ask.scores, scores)
            assert told(its) == told(ask.alone(rules)), ask


@pytest.mark.parametrize("seed", range(5))
def test_the_usual_case_of_long_contexts(seed: int) -> None:
    """As a server with one policy has it: single precision, hundreds of pages, equal and unequal lengths."""
    chance = np.random.default_rng(seed)
    rules = Rules(LSAConfig(), 20_000, {"indexer": 0.001}, {"indexer": EXPECTATION})
    for policy in ("quest", "indexer"):
        lengths = [640] * 8 if seed % 2 else chance.integers(500, 2100, 8).tolist()
        asks = [
            Ask(
                np.exp(chance.normal(-6, 2, n)).astype(np.float32),
                n + 1,
                0.135,
                policy,
                n - 30,
                np.arange(n // 2, n // 2 + 2),
            )
            for n in lengths
        ]
        for ask, its in zip(asks, choose_all(rules, asks), strict=True):
            assert told(its) == told(ask.alone(rules))
            assert 0 < len(its.positions) < ask.context / 4


def test_sets_do_not_keep_each_other_in_memory() -> None:
    """Windows are remembered for as long as their request is."""
    asks = [Ask(np.arange(100.0), 100, 0.2) for _ in range(8)]
    for found in choose_all(Rules(LSAConfig(), 1000), asks):
        assert found.positions.base is None and found.ranks.base is None
