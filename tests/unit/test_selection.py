"""select: the resident set as a pure function of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.choose import Rules, choose
from sglang_lsa.engine.selection import (
    Watched,
    affordable,
    always_kept,
    budget_pages,
    expected_coverage,
    select,
    watched,
    widened,
)

REPEATABLE = settings(derandomize=True, database=None, deadline=None, max_examples=300)


def chosen(scores: Any, context_pages: int | None = None, **options: Any) -> list[int]:
    scores = np.asarray(scores, dtype=np.float64)
    defaults = {"budget": 0.5, "min_pages": 1, "sink_pages": 1, "recent_pages": 1}
    pages = len(scores) if context_pages is None else context_pages
    return select(scores, pages, **{**defaults, **options}).tolist()


# --- examples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context_pages", "budget", "min_pages", "bound"),
    [
        (0, 0.1, 8, 0),
        (1, 0.1, 8, 1),
        (7, 0.1, 8, 7),
        (100, 0.135, 8, 13),
        (100, 0.05, 8, 8),
        (100, 1.0, 8, 100),
        (2048, 0.135, 8, 276),
    ],
)
def test_budget_pages(context_pages: int, budget: float, min_pages: int, bound: int) -> None:
    assert budget_pages(context_pages, budget, min_pages) == bound


@pytest.mark.parametrize(
    ("context_pages", "options", "page_tokens", "largest", "bound"),
    [
        (20, {}, 64, 1000, 20),
        (64, {}, 64, 1000, 24),
        (64, {"budget": 0.5}, 64, 1000, 32),
        (177, {}, 64, 1000, 24),
        (256, {}, 64, 1000, 34),
        (64, {}, 64, 16, 16),
        (64, {"floor_tokens": 0}, 64, 1000, 8),
        (64, {"floor_tokens": 639}, 64, 1000, 9),
        (64, {}, 256, 1000, 8),
        (64, {"floor_tokens": 2560}, 256, 1000, 10),
    ],
)
def test_of_short_contexts_a_larger_share_stays(
    context_pages: int, options: dict[str, Any], page_tokens: int, largest: float, bound: int
) -> None:
    """24 pages of 64 tokens; DeepSeek-V4's are larger, so that 8 are more than that; no more than a small pool has."""
    config = LSAConfig(policy="quest", **options)
    rules = Rules(config, largest, page_tokens=page_tokens)
    assert rules.set_pages(context_pages, config.largest_budget) == bound


def test_sink_recent_and_the_best() -> None:
    assert chosen([0, 1, 9, 2, 8, 3, 7, 0], budget=0.5) == [0, 2, 4, 7]


def test_sink_and_recent_stay_whatever_they_score() -> None:
    assert chosen([-9, 5, 6, 7, 8, 5, 4, -9], budget=0.25) == [0, 7]


def test_the_partly_filled_page_counts_as_a_recent_one() -> None:
    # 8 complete pages and a growing ninth: the set of 4 is sink, the two best and the growing page.
    assert chosen([0, 1, 9, 2, 8, 3, 7, 0], context_pages=9, budget=0.5) == [0, 2, 4]


def test_several_recent_pages() -> None:
    scores = [0] * 16
    assert chosen(scores, budget=0.75, recent_pages=3, threshold=0.0) == [0, 13, 14, 15]
    assert chosen(scores, context_pages=17, budget=0.75, recent_pages=3, threshold=0.0) == [0, 14, 15]


def test_recent_pages_take_at_most_a_quarter() -> None:
    assert chosen([0] * 16, budget=0.5, recent_pages=16, threshold=0.0) == [0, 14, 15]


def test_sink_pages_take_at_most_half() -> None:
    assert chosen([0] * 16, budget=0.5, sink_pages=16, threshold=0.0) == [0, 1, 2, 3, 15]


def test_one_recent_page_always_stays() -> None:
    assert chosen([5, 5, 5, 0], budget=0.25, sink_pages=0, recent_pages=0) == [3]


def test_ties_go_to_the_more_recent_page() -> None:
    assert chosen([1] * 10, budget=0.5) == [0, 6, 7, 8, 9]


@pytest.mark.parametrize("seed", range(40))
def test_the_best_are_the_first_of_all_in_order(seed: int) -> None:
    """Higher scores first, of equal ones the more recent page; infinite ones, too."""
    chance = np.random.default_rng(seed)
    scores = chance.integers(0, 1 + seed % 5 * 4, 50).astype(np.float64)
    scores[chance.random(50) < 0.1] = np.inf
    scores[chance.random(50) < 0.2] = -np.inf
    for size in range(2, 50):
        free = sorted(range(1, 49), key=lambda page: (-scores[page], -page))
        best = [page for page in free if scores[page] > -np.inf][: size - 2]
        assert chosen(scores, budget=1e-9, min_pages=size) == sorted([0, *best, 49])


def test_scores_at_or_below_the_threshold_are_left_out() -> None:
    scores = [0, 1, 2, 3, 4, 5, 6, 0]
    assert chosen(scores, budget=0.75, threshold=3.0) == [0, 4, 5, 6, 7]
    assert chosen(scores, budget=0.75, threshold=100.0) == [0, 7]


def test_nan_is_not_worth_keeping() -> None:
    nan = float("nan")
    assert chosen([nan, 1, nan, 2, nan, nan, 3, nan], budget=0.75) == [0, 1, 3, 6, 7]
    assert chosen([nan] * 8, budget=0.75) == [0, 7]


def test_infinite_scores() -> None:
    inf = float("inf")
    assert chosen([0, 1, inf, 2, 3, 4, 5, 0], budget=0.4) == [0, 2, 7]
    assert chosen([0, -inf, 1, -inf, 2, -inf, -inf, 0], budget=0.75) == [0, 2, 4, 7]


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_a_set_that_fits_needs_no_scores(pages: int) -> None:
    assert chosen([float("nan")] * pages, budget=0.01, min_pages=3) == list(range(pages))


def test_nothing_to_choose_from() -> None:
    assert chosen([], context_pages=0) == []
    assert chosen([], context_pages=1) == []


def test_budget_one_keeps_every_page() -> None:
    assert chosen([float("nan"), -1, 0], budget=1.0, threshold=100.0) == [0, 1, 2]


def test_the_type_is_an_index() -> None:
    for budget in (0.5, 1.0):
        result = select(
            np.ones(8, dtype=np.float32), 8, budget=budget, min_pages=1, sink_pages=1, recent_pages=1, threshold=0.0
        )
        assert result.dtype == np.int64


@pytest.mark.parametrize(("scores", "context_pages"), [(3, 5), (3, 2), (0, 2)])
def test_a_score_for_every_complete_page(scores: int, context_pages: int) -> None:
    with pytest.raises(ValueError, match=f"{scores} scores for {context_pages} pages: score every complete page"):
        chosen([1.0] * scores, context_pages=context_pages)


# --- what stays whatever its score -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context_pages", "bound", "sink", "recent", "kept"),
    [
        pytest.param(10, 8, 1, 2, [0, 8, 9], id="as asked for"),
        pytest.param(10, 8, 0, 0, [9], id="one recent page always"),
        pytest.param(10, 4, 9, 9, [0, 1, 9], id="half and a quarter of the set at most"),
        pytest.param(16, 8, 2, 9, [0, 1, 14, 15], id="a quarter of the set"),
        pytest.param(10, 1, 5, 5, [9], id="a set of one page"),
        pytest.param(2, 2, 1, 1, [0, 1], id="both ends are all there is"),
        pytest.param(1, 1, 1, 1, [0], id="one page"),
        pytest.param(0, 0, 1, 1, [], id="no page"),
    ],
)
def test_always_kept(context_pages: int, bound: int, sink: int, recent: int, kept: list[int]) -> None:
    stay = always_kept(context_pages, bound, sink, recent)
    assert stay.dtype == np.bool_ and len(stay) == context_pages
    assert np.flatnonzero(stay).tolist() == kept


@pytest.mark.parametrize(
    ("prompt", "pages", "bound", "kept"),
    [
        pytest.param(10, 2, 8, [0, 8, 9, 19], id="as asked for"),
        pytest.param(10, 9, 8, [0, 8, 9, 19], id="a quarter of the set at most"),
        pytest.param(10, 2, 3, [0, 19], id="a set without room for it"),
        pytest.param(20, 2, 8, [0, 18, 19], id="nothing is generated yet"),
        pytest.param(1, 2, 8, [0, 19], id="a prompt of one page"),
        pytest.param(0, 2, 8, [0, 19], id="no prompt"),
    ],
)
def test_the_end_of_the_prompt_is_kept(prompt: int, pages: int, bound: int, kept: list[int]) -> None:
    stay = always_kept(20, bound, 1, 1, prompt, pages)
    assert np.flatnonzero(stay).tolist() == kept
    options = {"min_pages": bound, "budget": 0.01, "prompt": prompt, "prompt_pages": pages}
    assert chosen([0] * 20, threshold=0.0, **options) == kept


# --- the best that fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "costs", "room", "best"),
    [
        pytest.param([1, 3, 2], [1, 1, 1], 3, [1, 2, 0], id="all fit"),
        pytest.param([1, 3, 2], [1, 1, 1], 2, [1, 2], id="the worst does not"),
        pytest.param([1, 3, 2], [1, 1, 1], 0, [], id="nothing fits"),
        pytest.param([1, 3, 2], [0, 0, 0], 0, [1, 2, 0], id="all are there"),
        pytest.param([4, 3, 2, 1], [1, 1, 0, 1], 1, [0, 2], id="one that is too dear is passed over"),
        pytest.param([4, 3, 2, 1], [1, 0, 1, 0], 0, [1, 3], id="what is there costs nothing"),
        pytest.param([2, 9, 2, 2], [1, 1, 1, 1], 3, [1, 0, 2], id="ties to the first"),
        pytest.param([5, float("inf"), 6, float("inf")], [1, 1, 1, 1], 3, [1, 3, 2], id="what must stay comes first"),
        pytest.param([float("-inf"), 0], [0, 1], 1, [1, 0], id="worthless but there"),
        pytest.param([], [], 3, [], id="no pages"),
    ],
)
def test_affordable(ranks: list[float], costs: list[int], room: int, best: list[int]) -> None:
    found = affordable(np.array(ranks, dtype=np.float64), np.array(costs, dtype=bool), room)
    assert found.dtype == np.int64
    assert found.tolist() == best


# --- properties ------------------------------------------------------------------------------------------------------


@REPEATABLE
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0, float("inf")]), st.booleans())), st.integers(0, 12))
def test_no_page_that_fits_is_worse_than_one_left_out(pages: list[tuple[float, bool]], room: int) -> None:
    ranks = np.array([rank for rank, _ in pages], dtype=np.float64)
    costs = np.array([cost for _, cost in pages], dtype=bool)
    found = affordable(ranks, costs, room)
    kept = set(found.tolist())
    assert len(kept) == len(found)
    assert (np.diff(ranks[found][np.isfinite(ranks[found])]) <= 0).all(), "not the best first"
    paid = [index for index in kept if costs[index]]
    left = [index for index in range(len(pages)) if index not in kept]
    assert len(paid) <= room
    assert all(costs[index] for index in left), "left out although it costs nothing"
    assert not left or len(paid) == room, "left out although there was room"
    assert max((ranks[index] for index in left), default=-1.0) <= min((ranks[i] for i in paid), default=np.inf)


@st.composite
def calls(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any]]:
    # Few different values, so that ties are common.
    value = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, -1.0]) | st.floats(width=32)
    scores = np.asarray(draw(st.lists(value, max_size=60)), dtype=np.float64)
    options = {
        "context_pages": len(scores) + draw(st.integers(0, 1)),
        "budget": draw(st.floats(0.01, 1.0)),
        "min_pages": draw(st.integers(1, 12)),
        "sink_pages": draw(st.integers(0, 6)),
        "recent_pages": draw(st.integers(0, 6)),
        "threshold": draw(st.sampled_from([float("-inf"), -0.5, 0.0, 0.25, 1.0])),
    }
    return scores, options


@REPEATABLE
@given(calls())
def test_the_set_is_bounded_sorted_and_keeps_both_ends(call: tuple[np.ndarray, dict[str, Any]]) -> None:
    scores, options = call
    original = scores.copy()
    positions = select(scores, **options)
    complete, context = len(scores), options["context_pages"]
    bound = budget_pages(context, options["budget"], options["min_pages"])
    growing = context - complete
    assert (np.diff(positions) > 0).all()
    assert not len(positions) or (positions[0] >= 0 and positions[-1] < complete)
    assert len(positions) + growing <= max(bound, growing)
    if complete and not growing:
        assert positions[-1] == complete - 1
    sink = min(options["sink_pages"], bound // 2, complete)
    assert positions[:sink].tolist() == list(range(sink))
    recent = max(1, min(options["recent_pages"], bound // 4)) - growing
    assert set(range(max(0, complete - recent), complete)) <= set(positions.tolist())
    assert np.array_equal(scores, original, equal_nan=True)


@REPEATABLE
@given(calls(), st.integers(0, 60), st.integers(0, 9))
def test_what_stays_fits_into_the_set(call: tuple[np.ndarray, dict[str, Any]], prompt: int, pages: int) -> None:
    scores, options = call
    context = options["context_pages"]
    options |= {"prompt": min(prompt, context), "prompt_pages": pages}
    positions = select(scores, **options)
    bound = budget_pages(context, options["budget"], options["min_pages"])
    sizes = {name: options[name] for name in ("sink_pages", "recent_pages", "prompt", "prompt_pages")}
    stay = always_kept(context, bound, **sizes)
    assert stay.sum() <= max(bound, 1)
    assert set(np.flatnonzero(stay[: len(scores)]).tolist()) <= set(positions.tolist())
    assert len(positions) + context - len(scores) <= max(bound, context - len(scores))


@REPEATABLE
@given(calls())
def test_what_is_left_out_is_worse_or_below_the_threshold(call: tuple[np.ndarray, dict[str, Any]]) -> None:
    scores, options = call
    positions = set(select(scores, **options).tolist())
    complete, context, threshold = len(scores), options["context_pages"], options["threshold"]
    bound = budget_pages(context, options["budget"], options["min_pages"])
    if bound >= context:
        assert positions == set(range(complete))
        return
    recent = max(1, min(options["recent_pages"], bound // 4))
    sink = min(options["sink_pages"], bound // 2)
    middle = range(sink, context - recent)
    kept = [page for page in middle if page in positions]
    left = [page for page in middle if page not in positions]
    assert all(scores[page] > threshold for page in kept)
    worthy = [page for page in left if scores[page] > threshold]
    if worthy:  # then the budget is used up, and by better ones
        assert len(positions) + context - complete == bound
        worst = min((scores[page], page) for page in kept) if kept else (np.inf, complete)
        assert max((scores[page], page) for page in worthy) < worst


@REPEATABLE
@given(calls())
def test_more_budget_never_takes_a_page_away(call: tuple[np.ndarray, dict[str, Any]]) -> None:
    scores, options = call
    # Sink and recent pages grow with the budget at the cost of others, so they are fixed here.
    options = {**options, "sink_pages": 0, "recent_pages": 1, "min_pages": 1}
    small = set(select(scores, **options).tolist())
    large = set(select(scores, **{**options, "budget": min(1.0, options["budget"] * 1.5)}).tolist())
    assert small <= large


# --- what a set is expected to cover ----------------------------------------------------------------------------------

STAY = np.array([True, False, False, False, False, True])
SHARES = np.array([9.0, 0.1, 0.2, 0.3, 0.4, 9.0])


@pytest.mark.parametrize(
    ("positions", "coverage"),
    [([0, 5], 0.0), ([0, 4, 5], 0.4), ([0, 1, 3, 5], 0.4), ([0, 1, 2, 3, 4, 5], 1.0)],
)
def test_coverage_is_of_pages_that_may_be_left_out(positions: list[int], coverage: float) -> None:
    assert expected_coverage(SHARES, np.array(positions), STAY) == pytest.approx(coverage)


def test_coverage_where_there_is_nothing_to_cover() -> None:
    assert expected_coverage(np.zeros(6), np.array([0, 1, 5]), STAY) == 0.0
    assert expected_coverage(SHARES, np.array([0]), np.ones(6, dtype=bool)) == 1.0
    assert expected_coverage(np.array([1, np.nan, -np.inf, 0.5, 0, 0]), np.array([0, 3, 5]), STAY) == 1.0


@pytest.mark.parametrize(
    ("coverage", "bound", "most", "size"),
    [
        pytest.param(0.4, 2, 6, 3, id="one page is enough"),
        pytest.param(0.41, 2, 6, 4, id="two pages"),
        pytest.param(0.9, 2, 6, 5, id="three"),
        pytest.param(1.0, 2, 6, 6, id="all"),
        pytest.param(0.9, 2, 4, 4, id="more than there may be"),
        pytest.param(0.4, 5, 6, 5, id="never smaller than the budget"),
        pytest.param(0.9, 5, 3, 5, id="nothing to widen to"),
    ],
)
def test_sets_are_widened_until_they_cover_enough(coverage: float, bound: int, most: int, size: int) -> None:
    assert widened(SHARES, STAY, bound, most, coverage) == size


@pytest.mark.parametrize("shares", [np.zeros(6), np.full(6, np.nan)], ids=["zeros", "no numbers"])
def test_scores_that_say_nothing_widen_as_far_as_allowed(shares: np.ndarray) -> None:
    assert widened(shares, STAY, 2, 5, 0.5) == 5


# --- pages that somebody asks about ----------------------------------------------------------------------------------


def test_what_pages_were_worth() -> None:
    scores = np.array([9, 0.25, 4, -np.inf, 3, 8])
    positions, stays = np.array([0, 2, 4, 5]), np.array([True, False, False, True])
    assert watched((1, 2, 3, 5, 6), scores, positions, stays) == Watched(
        ((1, 0.25, 2), (2, 4.0, 0), (3, None, 3), (5, 8.0, 0)), 3.0
    )


def test_a_set_of_first_and_last_pages_has_no_lowest_score() -> None:
    assert watched((), np.ones(3), np.array([0]), np.array([True])) == Watched((), None)


# --- wider while a request repeats its prompt -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widen", "follows", "largest", "positions"),
    [
        (1.0, None, 40, [0, 1, 16, 18, 19]),
        (1.0, 5, 40, [0, 1, 16, 18, 19]),
        (2.0, None, 40, [0, 1, 3, 7, 13, 14, 15, 16, 18, 19]),
        (2.0, 5, 40, [0, 1, 5, 6, 7, 8, 9, 10, 16, 18, 19]),
        (2.0, 18, 40, [0, 1, 3, 7, 13, 14, 15, 16, 18, 19]),
        (2.0, 5, 7, [0, 1, 5, 16, 18, 19]),
        (4.0, 0, 40, list(range(20))),
    ],
    ids=["repeats nothing", "must not", "copies", "lists", "lists at the end", "largest set", "whole"],
)
def test_sets_of_a_request_that_repeats_its_prompt(
    widen: float, follows: int | None, largest: float, positions: list[int]
) -> None:
    """Of 21 pages six, the last partly filled: one first, one recent, one of the question, and scored ones."""
    rules = Rules(LSAConfig(min_pages=6, floor_tokens=0, sink_pages=1, recent_pages=4, prompt_pages=2), largest)
    scores = np.zeros(20)
    scores[[1, 19, 16, 15, 14, 7, 3, 13]] = [9, 8.5, 8, 7, 6, 5, 4, 3]
    found = choose(rules, scores, 21, 0.1, prompt=19, widen=widen, follows=follows)
    assert (found.positions.tolist(), found.widened) == (positions, widen > 1)
