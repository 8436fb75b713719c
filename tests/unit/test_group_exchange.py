"""Choose for the group: of pages that are nearly as good, those that a group reads; and what that leaves as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.choose import Rules, choose
from sglang_lsa.engine.group_choice import exchanged
from sglang_lsa.engine.groups import Group, GroupRules, Reader, Sharing, form
from sglang_lsa.engine.selection import filled
from sglang_lsa.indexer.expectation import Expectation

REPEATABLE = settings(derandomize=True, database=None, deadline=None, max_examples=300)
ANY = GroupRules(least_saved=1e-9)
NONE_STAYS = np.zeros(8, dtype=bool)


def exchange(
    positions: list[int],
    scores: list[float],
    common: list[int],
    margin: float,
    stay: np.ndarray = NONE_STAYS,
    threshold: float = 0.0,
) -> list[int]:
    of = [np.array(each, dtype=np.int64) for each in (positions, common)]
    return exchanged(of[0], np.array(scores), stay, of[1], margin, threshold).tolist()


# --- examples --------------------------------------------------------------------------------------------------------

SCORES = [0.9, 0.8, 0.5, 0.47, 0.45, 0.1, 0.0, -0.2]


def test_a_page_that_is_nearly_as_good_and_read_anyway_wins() -> None:
    assert exchange([0, 1, 2], SCORES, [3], 0.1) == [0, 1, 3]
    assert exchange([0, 1, 2], SCORES, [3], 0.01) == [0, 1, 2], "0.47 is less than 99 % of 0.5"
    assert exchange([0, 1, 2], SCORES, [5], 0.1) == [0, 1, 2], "far worse"


def test_a_page_that_the_group_reads_does_not_go() -> None:
    assert exchange([0, 1, 2], SCORES, [1, 2, 3], 0.1) == [0, 1, 2], "0.47 would have to replace 0.9"
    assert exchange([0, 1, 2], SCORES, [1, 2, 3], 0.5) == [1, 2, 3]


def test_the_worst_goes_and_the_best_comes() -> None:
    assert exchange([0, 1, 2], SCORES, [3, 4], 0.1) == [0, 1, 3]
    assert exchange([1, 2], SCORES, [3, 4], 0.5) == [3, 4]


def test_what_stays_stays() -> None:
    stay = NONE_STAYS.copy()
    stay[2] = True
    assert exchange([0, 1, 2], SCORES, [3], 0.1, stay) == [0, 1, 2]


@pytest.mark.parametrize(
    ("common", "threshold"),
    [
        pytest.param([], 0.0, id="nobody reads anything"),
        pytest.param([6, 7], 0.0, id="worth nothing, and less"),
        pytest.param([3], 0.48, id="below the threshold"),
        pytest.param([8, 9], 0.0, id="not complete when the scores were asked for"),
    ],
)
def test_pages_that_do_not_come(common: list[int], threshold: float) -> None:
    assert exchange([0, 1, 2], SCORES, common, 0.9, threshold=threshold) == [0, 1, 2]


def test_scores_that_are_no_numbers_do_not_come() -> None:
    assert exchange([0], [0.5, -np.inf, -np.inf], [1, 2], 0.9) == [0]


# --- properties ------------------------------------------------------------------------------------------------------

MARGINS = st.sampled_from([0.0, 0.1, 0.3, 0.9])


@st.composite
def sets(draw: st.DrawFn) -> dict[str, Any]:
    """A set as it is chosen for a request alone, and what its group reads."""
    pages = draw(st.integers(1, 16))
    scores = np.array(
        [draw(st.sampled_from([-np.inf, -0.1, 0.0, 0.1, 0.2, 0.25, 0.5, 0.9, 1.0])) for _ in range(pages)]
    )
    stay = np.array([draw(st.integers(0, 4)) == 0 for _ in range(pages)])
    threshold = draw(st.sampled_from([0.0, 0.15]))
    positions = filled(scores, stay, draw(st.integers(1, pages)), threshold)
    common = np.array([page for page in range(pages) if draw(st.booleans())], dtype=np.int64)
    return {"positions": positions, "scores": scores, "stay": stay, "common": common, "threshold": threshold}


@REPEATABLE
@given(sets(), MARGINS)
def test_what_an_exchange_leaves(one: dict[str, Any], margin: float) -> None:
    before, scores, stay, common = one["positions"], one["scores"], one["stay"], one["common"]
    after = exchanged(**one, margin=margin)
    assert len(after) == len(before) and (np.diff(after) > 0).all(), "never fewer pages"
    assert set(before[stay[before]]) <= set(after), "first, last and the prompt's pages stay"
    gone, come = np.setdiff1d(before, after), np.setdiff1d(after, before)
    assert set(come) <= set(common) and not set(gone) & set(common)
    assert set(after) | set(common) <= set(before) | set(common), "what is read is not more"
    left_out = np.setdiff1d(common, before)
    if len(left_out):
        top = before[scores[before] * (1 - margin) > scores[left_out].max()]
        assert set(top) <= set(after), "a page that scores clearly higher was lost"
    assert len(gone) == 0 or scores[come].min() >= (1 - margin) * scores[gone].max()
    assert scores[come].sum() >= (1 - margin) * scores[gone].sum() - 1e-12


@REPEATABLE
@given(sets(), MARGINS)
def test_as_many_are_exchanged_as_may(one: dict[str, Any], margin: float) -> None:
    """Against trying all numbers, with sets and one page at a time."""
    after = exchanged(**one, margin=margin)
    worst_first = sorted(
        (one["scores"][p], p) for p in one["positions"] if not one["stay"][p] and p not in one["common"]
    )
    best_first = sorted(
        ((-one["scores"][p], p) for p in one["common"] if p not in one["positions"]),
    )
    best_first = [(score, p) for score, p in best_first if -score > max(one["threshold"], 0.0)]
    most = 0
    for count in range(1, min(len(worst_first), len(best_first)) + 1):
        if -best_first[count - 1][0] >= (1 - margin) * worst_first[count - 1][0]:
            most = count
    assert len(np.setdiff1d(after, one["positions"])) == most


def alone(seed: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Sets of requests over one prefix, chosen for each alone; their scores, pages that stay, the prefix."""
    draw = np.random.default_rng(seed)
    pages, members = int(draw.integers(4, 30)), int(draw.integers(2, 6))
    stay = np.zeros(pages, dtype=bool)
    stay[0] = True
    shared, scores, sets = draw.random(pages), [], []
    for _ in range(members):
        scores.append((shared + draw.random(pages) * draw.choice([0.1, 1.0])).round(2))
        sets.append(filled(scores[-1], stay, int(draw.integers(1, pages))))
    return sets, scores, stay, np.arange(100, 100 + pages)


def paid(readers: list[Reader]) -> float:
    """What a step costs: reads below the tails, in reads of a page, by the rules."""
    saved = sum(group.saved for group in form(readers, ANY))
    return sum(len(reader.positions) for reader in readers) - saved


def worth_sharing(readers: list[Reader], group: Group, place: int, rules: GroupRules) -> list[int]:
    """Positions that would be read for all of the group if this member chose them; page by page."""
    common, members = 0, [readers[member] for member in group.members]
    while (
        all(len(each.prefix) > common for each in members) and len({int(each.prefix[common]) for each in members}) == 1
    ):
        common += 1
    others = [set(readers[other].positions.tolist()) for other in group.members if other != place]
    return [
        position
        for position in range(common)
        if sum(position in each for each in others) + 1 > rules.price(len(group.members))
    ]


@REPEATABLE
@given(st.integers(0, 10_000), st.lists(st.integers(0, 5), max_size=8))
def test_what_is_worth_sharing_after_every_change(seed: int, turns: list[int]) -> None:
    """Choices are counted once, and as they change: as if all were looked at each time."""
    sets, _, _, prefix = alone(seed)
    draw = np.random.default_rng(seed)
    private = [np.append(prefix, 1000 + place) for place in range(len(sets))]  # behind what all share
    readers = [Reader(each, own) for each, own in zip(private, sets, strict=True)]
    for group in form(readers, ANY):
        sharing = Sharing(readers, group, ANY)
        for turn in turns:
            place = group.members[turn % len(group.members)]
            before = readers[place].positions
            assert sharing.worth(before).tolist() == worth_sharing(readers, group, place, ANY)
            after = np.flatnonzero(draw.random(len(prefix) + 1) < 0.5)
            sharing.change(before, after)
            readers[place] = Reader(private[place], after)


@REPEATABLE
@given(st.integers(0, 10_000), MARGINS)
def test_members_of_groups_that_are_formed_once_read_no_more(seed: int, margin: float) -> None:
    """As below, where nobody asks anew who is in whose group."""
    sets, scores, stay, prefix = alone(seed)
    before = [Reader(prefix, each) for each in sets]
    for group in form(before, ANY):
        sharing = Sharing(before, group, ANY)
        for place in group.members:
            found = exchanged(sets[place], scores[place], stay, sharing.worth(sets[place]), margin, 0.0)
            sharing.change(sets[place], found)
            sets[place] = found
    after = [Reader(prefix, each) for each in sets]
    assert set(np.concatenate(sets)) <= set(np.concatenate([reader.positions for reader in before]))
    came = sum(len(np.setdiff1d(now.positions, then.positions)) for now, then in zip(after, before, strict=True))
    assert paid(after) <= paid(before) - (1 - 6 / 64) * came + 1e-9


@REPEATABLE
@given(st.integers(0, 10_000), MARGINS)
def test_a_group_reads_no_more_when_its_members_exchange_by_turns(seed: int, margin: float) -> None:
    """Not of different pages, which is what the device must hold, nor in a step."""
    sets, scores, stay, prefix = alone(seed)
    for place, before in enumerate(sets):
        readers = [Reader(prefix, each) for each in sets]
        group = next((group for group in form(readers, ANY) if place in group.members), None)
        if group is None:
            continue
        common = Sharing(readers, group, ANY).worth(sets[place])
        assert set(common) <= set(np.concatenate([each for other, each in enumerate(sets) if other != place]))
        assert set(group.positions) <= set(common) | set(before)
        sets[place] = exchanged(before, scores[place], stay, common, margin, 0.0)
        after = [Reader(prefix, each) for each in sets]
        assert set(np.concatenate(sets)) <= set(np.concatenate([reader.positions for reader in readers]))
        assert paid(after) <= paid(readers) - (1 - 6 / 64) * len(np.setdiff1d(sets[place], before)) + 1e-9


def test_what_is_worth_sharing() -> None:
    """One more reader is enough below 64 members; beyond that two are not worth a read for all."""
    readers = [Reader(np.arange(9), np.array(each)) for each in ([0, 1, 2], [0, 1, 4], [0, 5])]
    (group,) = form(readers, ANY)
    assert group.positions.tolist() == [0, 1]
    sharing = Sharing(readers, group, ANY)
    assert [sharing.worth(reader.positions).tolist() for reader in readers] == [
        [0, 1, 4, 5],
        [0, 1, 2, 5],
        [0, 1, 2, 4],
    ]
    many = [Reader(np.arange(9), np.array([0, 1] if place == 0 else [0])) for place in range(70)]
    (group,) = form(many, ANY)
    assert Sharing(many, group, ANY).worth(many[5].positions).tolist() == [0]


def test_what_lies_behind_the_common_prefix_cannot_be_shared() -> None:
    readers = [Reader(np.array([1, 2, 3, own]), np.arange(4)) for own in (8, 9)]
    (group,) = form(readers, ANY)
    assert Sharing(readers, group, ANY).worth(readers[0].positions).tolist() == [0, 1, 2]


def test_without_a_group_nothing_is_looked_at() -> None:
    rules = Rules(LSAConfig(groups=True, group_margin=0.9), largest_set=100)
    scores = np.linspace(0, 1, 50)
    alone = choose(rules, scores, 51, 0.3)
    assert np.array_equal(alone.positions, choose(rules, scores, 51, 0.3, common=np.zeros(0, dtype=np.int64)).positions)
    common = choose(rules, scores, 51, 0.3, common=np.arange(30, 37))
    assert len(common.positions) == len(alone.positions) and len(common.ranks) == len(common.positions)
    assert set(np.setdiff1d(common.positions, alone.positions)) <= set(range(30, 37))


@pytest.mark.parametrize("margin", [0.1, 0.6])
def test_looked_up_pages_do_not_go_for_later_ones(margin: float) -> None:
    """More of them than there is room for: the set has those that are read first, whatever its group reads."""
    rules = Rules(
        LSAConfig(groups=True, group_margin=margin, sink_pages=1, recent_pages=1, min_pages=1, floor_tokens=0), 100
    )
    scores, upcoming, later = np.full(20, 0.1), np.arange(5, 15), np.arange(9, 15)
    alone = choose(rules, scores, 21, 0.3, upcoming=upcoming)
    assert {5, 6, 7, 8} <= set(alone.positions.tolist()) and not set(later) & set(alone.positions)
    found = choose(rules, scores, 21, 0.3, upcoming=upcoming, common=later)
    assert found.positions.tolist() == alone.positions.tolist()


TOLD = Expectation(((0.0, 0.0, 0.0), (0.5, 0.7, 0.1), (1.0, 1.0, 1.0)))
SIZED = Rules(LSAConfig(groups=True, group_margin=0.4, min_pages=1, floor_tokens=0, sink_pages=1, prompt_pages=0), 100)
SIZED.expectations, SIZED.thresholds = {"indexer": TOLD}, {"indexer": 0.0}


@REPEATABLE
@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.5, 0.8, 0.95]), st.sampled_from([0.15, 0.5, 1.0]))
def test_a_set_that_is_as_large_as_it_needs_to_be_still_covers_its_target(
    seed: int, target: float, budget: float
) -> None:
    """Or what it covered without a group, where the budget was too small for the target."""
    draw = np.random.default_rng(seed)
    scores, common = draw.random(40) ** 4, np.flatnonzero(draw.random(40) < 0.4)
    alone = choose(SIZED, scores, 41, budget, "indexer", target=target)
    found = choose(SIZED, scores, 41, budget, "indexer", target=target, common=common)
    assert alone.expected is not None and found.expected is not None
    assert len(found.positions) == len(alone.positions)
    assert found.expected >= min(target, alone.expected) - 1e-9


@REPEATABLE
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.2, 0.5, 0.8, 0.95]),
    st.sampled_from([0.15, 0.3, 1.0]),
    st.sampled_from([0.0, 0.4, 0.9]),
    st.sampled_from([(), (7, 21)]),
)
def test_a_set_that_is_widened_for_what_it_covers_still_covers_it(
    seed: int, least: float, fallback: float, margin: float, upcoming: tuple[int, ...]
) -> None:
    """Or what it covered without a group, where the budget was too small for it."""
    config = {"group_margin": margin, "min_coverage": least, "fallback_budget": fallback}
    rules = Rules(LSAConfig(groups=True, min_pages=1, floor_tokens=0, sink_pages=1, prompt_pages=0, **config), 100)
    rules.thresholds = {"indexer": 0.0}
    draw = np.random.default_rng(seed)
    scores, common = draw.random(40) ** 4, np.flatnonzero(draw.random(40) < 0.4)
    scores[draw.random(40) < 0.1] = np.nan
    alone = choose(rules, scores, 41, 0.15, "indexer", upcoming=upcoming)
    found = choose(rules, scores, 41, 0.15, "indexer", upcoming=upcoming, common=common)
    assert alone.coverage is not None and found.coverage is not None
    assert len(found.positions) == len(alone.positions)
    assert found.coverage >= min(least, alone.coverage) - 1e-9
    if not margin:
        assert found.coverage >= alone.coverage - 1e-9


def test_without_a_fallback_budget_nothing_is_widened_and_the_margin_alone_counts() -> None:
    scores, common = np.array([1.0, 1, 1, 0.7, 0.7, 0.7, *[0.5] * 14]), np.arange(3, 6)
    found = []
    for fallback in (None, 0.15):
        config = LSAConfig(
            groups=True, group_margin=0.4, min_coverage=0.3, fallback_budget=fallback, min_pages=1, floor_tokens=0
        )
        rules = Rules(dataclasses.replace(config, sink_pages=0, recent_pages=1, prompt_pages=0), 100)
        rules.thresholds = {"indexer": 0.0}
        found.append(choose(rules, scores, 21, 0.2, "indexer", common=common).positions.tolist())
    assert found == [[3, 4, 5], [0, 1, 2]]


def test_what_a_set_covers_beyond_its_target_may_be_exchanged() -> None:
    """0.07 of all scores are to spare: enough for one page that is worth less by 0.04 of them, not for a second."""
    scores = np.array([0.0, 10, 10, 10, 10, 6, 6, 6, 6, 6, 6, 6, 6, 4, 4, 4])
    spare, worth = 0.07, scores / 100
    positions, common = np.arange(5), np.arange(5, 9)
    given = positions, scores, np.arange(16) == 0, common, 0.5, 0.0
    assert exchanged(*given, (spare, worth)).tolist() == [0, 2, 3, 4, 5]
    assert exchanged(*given, (0.0, worth)).tolist() == positions.tolist()
    assert exchanged(*given, (0.09, worth)).tolist() == [0, 3, 4, 5, 6]
    assert exchanged(*given).tolist() == [0, 5, 6, 7, 8], "nothing is to be covered"
