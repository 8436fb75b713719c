"""Sets that are as large as they need to be: the map from what is told to what is covered, and what is made of it."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.choose import Rules, choose
from sglang_lsa.engine.selection import always_kept, needed_pages, told_coverage
from sglang_lsa.indexer.checkpoint import IndexerConfig, ModelShape, read_checkpoint_config
from sglang_lsa.indexer.expectation import TOLD, Expectation

LINE = Expectation(((0.0, 0.2, 0.0), (0.5, 0.6, 0.1), (1.0, 1.0, 1.0)), "a line")
CONFIG = LSAConfig(indexer="x", budget="auto", max_budget=0.5, floor_tokens=0)


def rules(expectation: Expectation | None = LINE, config: LSAConfig = CONFIG, largest: int = 1 << 20) -> Rules:
    return Rules(config, largest, {"indexer": 0.01}, {} if expectation is None else {"indexer": expectation})


def peaked(pages: int, *best: int) -> np.ndarray:
    scores = np.full(pages, 0.0001)
    scores[list(best)] = 1.0
    return scores


# --- the map ----------------------------------------------------------------------------------------------------------


def test_a_map_is_read_between_its_points_and_backwards() -> None:
    assert LINE.covered(0.25) == pytest.approx(0.4)
    assert [LINE.told_for(target) for target in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx(
        [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    )
    assert [LINE.pages_for(target) for target in (0.1, 0.4, 0.6, 0.8)] == pytest.approx([0.0, 0.05, 0.1, 0.55])
    for told in np.linspace(0, 1, 11):
        assert LINE.told_for(LINE.covered(told)) == pytest.approx(told)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (((0.0, 0.0, 0.0),), "use two or more of three numbers"),
        (((0.0, 0.0), (1.0, 1.0)), "use two or more of three numbers"),
        (((0.0, 0.0, 0.0), (1.0, 1.1, 1.0)), "use numbers from 0 to 1"),
        (((0.0, 0.0, 0.0), (1.0, float("nan"), 1.0)), "use numbers from 0 to 1"),
        (((0.0, 0.5, 0.0), (1.0, 0.4, 1.0)), "do not ascend"),
        (((0.0, 0.5, 0.0), (0.0, 0.6, 1.0)), "do not ascend"),
        (((0.1, 0.0, 0.0), (1.0, 1.0, 1.0)), "goes from 0.1 to 1: begin at 0, end at 1"),
    ],
)
def test_no_map_is_refused(points: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Expectation(points)


def test_what_is_measured_is_what_sets_got() -> None:
    """Scores that are true are covered as told; those that are too sure of themselves cover less."""
    rng = np.random.default_rng(0)
    stay = np.zeros(40, dtype=bool)
    stay[[0, 38, 39]] = True
    masses = [rng.random(40) ** 6 for _ in range(30)]
    true = Expectation.measured([[(mass, mass, stay)] for mass in masses], "true")
    sure = Expectation.measured([[(mass**3, mass, stay)] for mass in masses], "sure of themselves")
    for told, covered, pages in true.points:
        assert told <= covered + 1e-5 and 0 <= pages <= 1
    assert true.covered(0.5) < 0.65 and sure.covered(0.5) < true.covered(0.5)
    assert [point[0] for point in true.points] == pytest.approx(TOLD)
    for target in (0.4, 0.6, 0.8):  # sets of that size cover the target, on average over the documents
        got = []
        for mass in masses:
            size = needed_pages(mass**3, stay, 0, 40, sure.told_for(target))
            best = np.flatnonzero(~stay)[np.argsort(-mass[~stay])][: size - 3]
            got.append((mass[stay].sum() + mass[best].sum()) / mass.sum())
        assert np.mean(got) == pytest.approx(target, abs=0.05)


def test_documents_weigh_the_same_and_nothing_to_measure_is_refused() -> None:
    stay = np.array([True, False, False, False])
    good, bad = (np.array([0.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0]))
    scores = np.array([0.0, 3.0, 2.0, 1.0])
    once = Expectation.measured([[(scores, good, stay)], [(scores, bad, stay)] * 5])
    assert once.covered(0.5) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="use longer prompts"):
        Expectation.measured([[(scores, good * 0, stay)], [(scores, good, ~(stay & False))]])


def test_a_checkpoint_keeps_it(tmp_path: pathlib.Path) -> None:
    config = IndexerConfig(ModelShape(64, 2, 4, 2, 16), ((0, 1),), key_dim=16, expectation=LINE)
    (tmp_path / "model.safetensors").touch()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dataclasses.asdict(config)))
    assert read_checkpoint_config(tmp_path) == config
    values = json.loads(file.read_text())
    for broken in ({"points": [[0, 0, 0]], "source": ""}, {"points": 3}, [1], {"points": [[0, 0, 0], [1, 1, "x"]]}):
        file.write_text(json.dumps(values | {"expectation": broken}))
        with pytest.raises(ValueError, match=r"config\.json is no indexer configuration"):
            read_checkpoint_config(tmp_path)
    file.write_text(json.dumps({name: value for name, value in values.items() if name != "expectation"}))
    assert read_checkpoint_config(tmp_path).expectation is None  # of an earlier version


# --- sets -------------------------------------------------------------------------------------------------------------


def test_few_pages_where_few_matter_and_many_where_many_do() -> None:
    few = choose(rules(), peaked(200, 50, 60, 70), 200, 0.5, "indexer", 200, target=0.6)
    assert {50, 60, 70} & set(few.positions) and len(few.positions) == CONFIG.min_pages
    flat = choose(rules(), np.ones(200), 200, 0.5, "indexer", 200, target=0.4)
    assert len(flat.positions) == 50  # a quarter of all scores
    assert flat.expected == pytest.approx(0.4) and not flat.widened and not flat.collapsed
    most = choose(rules(), np.ones(200), 200, 0.5, "indexer", 200, target=0.95)
    assert len(most.positions) == 100 and most.expected == pytest.approx(0.6)


def test_more_is_asked_for_more_pages_are_taken() -> None:
    scores = np.random.default_rng(1).random(300) ** 4
    sizes = []
    for target in np.linspace(0.1, 1, 19):
        found = choose(rules(), scores, 301, 0.5, "indexer", 300, target=float(target))
        stays = always_kept(301, 150, CONFIG.sink_pages, CONFIG.recent_pages, 300, CONFIG.prompt_pages)
        assert set(np.flatnonzero(stays[:300])) <= set(found.positions)
        left_out = np.setdiff1d(np.arange(300), found.positions)
        chosen = found.positions[~stays[found.positions]]
        assert scores[chosen].min() >= scores[left_out].max()  # in order of score
        sizes.append(len(found.positions))
    assert sizes == sorted(sizes) and sizes[0] < 20 and sizes[-1] == 149  # the growing page counts


def test_a_set_depends_on_the_request_alone() -> None:
    """Equal arguments give equal sets, whatever was chosen for others in between."""
    shared, scores = rules(), np.random.default_rng(2).random(100)
    before = choose(shared, scores, 100, 0.5, "indexer", 90, target=0.7)
    for seed in range(20):
        choose(shared, np.random.default_rng(seed).random(400) ** 9, 400, 0.5, "indexer", 400, target=0.9)
    after = choose(shared, scores, 100, 0.5, "indexer", 90, target=0.7)
    assert after.positions.tolist() == before.positions.tolist()


@pytest.mark.parametrize("scores", [np.zeros(60), np.full(60, np.nan), np.full(60, -np.inf)], ids=["0", "nan", "-inf"])
def test_scores_that_tell_nothing(scores: np.ndarray) -> None:
    found = choose(rules(), scores, 60, 0.5, "indexer", 60, target=0.6)
    assert found.collapsed and len(found.positions) < 10  # the pages that always stay
    assert told_coverage(scores, found.positions) == 0.0


def test_short_contexts_and_small_pools_bound_a_set() -> None:
    assert len(choose(rules(), np.ones(5), 5, 0.5, "indexer", 5, target=0.9).positions) == 5
    small = choose(rules(largest=6), np.ones(100), 100, 0.5, "indexer", 100, target=0.9)
    assert len(small.positions) == 6
    own = LSAConfig(indexer="x", budget="auto", max_budget=0.5, threshold=2.0, floor_tokens=0)
    assert choose(rules(config=own), np.ones(100), 100, 0.5, "indexer", 100, target=0.9).collapsed


def test_without_a_map_the_budget_bounds_a_set_and_fixed_budgets_stay_what_they_are() -> None:
    scores = np.random.default_rng(3).random(200)
    failed = choose(rules(), scores, 200, 0.2, "", 200, target=0.6)
    assert len(failed.positions) == 40 and failed.expected is None
    fixed = choose(rules(), scores, 200, 0.2, "indexer", 200)
    assert len(fixed.positions) == 40 and fixed.expected == pytest.approx(
        LINE.covered(told_coverage(scores, fixed.positions))
    )


def test_an_answer_that_repeats_its_prompt_widens_what_it_needs() -> None:
    found = choose(rules(), np.ones(200), 200, 0.5, "indexer", 200, (), 2.0, 20, 0.4)
    assert len(found.positions) == 100 and found.widened
    assert set(range(20, 70)) <= set(found.positions)


# --- what is promised -------------------------------------------------------------------------------------------------


def test_what_is_expected_is_between_the_least_and_the_most() -> None:
    known = rules()
    assert known.expected_pages(1000, "indexer", 0.5, 0.6) == 5 + 100  # first and last pages, and a tenth of the others
    assert known.expected_pages(1000, "indexer", 0.05, 0.6) == known.set_pages(1000, 0.05) == 50
    assert known.expected_pages(40, "indexer", 0.5, 0.6) == 9
    assert known.expected_pages(1000, "indexer", 0.5, None) == 500
    assert rules(largest=30).expected_pages(1000, "indexer", 0.5, 0.6) == 30


def test_who_cannot_is_told_what_can() -> None:
    assert rules().no_auto("indexer") is rules().no_auto("full") is None
    assert "has no expectation: add it with sglang-lsa calibrate" in str(rules(None).no_auto("indexer"))
    assert "auto does not go with the policy quest" in str(rules().no_auto("quest"))
