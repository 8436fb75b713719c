"""Heat: which pages were selected often, and of late."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_lsa.memory import heat as heat_module
from sglang_lsa.memory.heat import HALF_LIFE, Heat, lowest


def ids(*pages: int) -> np.ndarray:
    return np.array(pages, dtype=np.int64)


def heat_of(*selections: tuple[int, ...], pages: int = 8) -> Heat:
    """Heat after resident sets of these pages, one after the other."""
    heat = Heat(pages)
    for selected in selections:
        heat.select(ids(*selected))
    return heat


def order(heat: Heat) -> list[int]:
    """Pages that were selected, hottest first."""
    return heat.hottest(np.arange(len(heat.values)), len(heat.values)).tolist()


# --- select and fade -------------------------------------------------------------------------------------------------


def test_new_pages_are_cold() -> None:
    heat = Heat(5)
    assert heat.values.tolist() == [0.0] * 5
    assert order(heat) == []


@pytest.mark.parametrize(
    ("selections", "expected"),
    [
        pytest.param([(1,), (2,)], [2, 1], id="later is hotter"),
        pytest.param([(1,), (1,), (2,)], [1, 2], id="twice is hotter than once, later"),
        pytest.param([(1, 2), (2, 3), (2,)], [2, 3, 1], id="often and late"),
        pytest.param([(), (4,)], [4], id="nothing selected"),
    ],
)
def test_order(selections: list[tuple[int, ...]], expected: list[int]) -> None:
    assert order(heat_of(*selections)) == expected


def test_a_set_warms_all_of_its_pages_alike() -> None:
    heat = heat_of((1, 3, 5))
    assert heat.values[ids(1, 3, 5)].tolist() == [1.0] * 3
    assert heat.values[ids(0, 2, 4, 6, 7)].tolist() == [0.0] * 5


def test_after_a_half_life_a_selection_counts_half() -> None:
    heat = heat_of((1,), *[(7,)] * (HALF_LIFE - 1), (2,))
    assert heat.values[2] / heat.values[1] == pytest.approx(2.0, rel=1e-9)
    for _ in range(HALF_LIFE - 1):
        heat.select(ids(7))
    heat.select(ids(3))
    assert heat.values[3] / heat.values[1] == pytest.approx(4.0, rel=1e-9)


def test_selecting_nothing_lets_others_fade() -> None:
    """Heat fades with selections, not with time: an empty set is one, too."""
    heat = heat_of((1,), (), (2,))
    assert heat.values[2] / heat.values[1] == pytest.approx(2 ** (2 / HALF_LIFE))


def test_numbers_stay_finite_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """They grow with every selection, and are made smaller together before they overflow."""
    monkeypatch.setattr(heat_module, "HALF_LIFE", 1)  # every selection counts twice the one before
    heat = Heat(6)
    rescaled = 0
    for turn in range(1200):
        unit = heat._unit
        heat.select(ids(turn % 5 + 1))
        rescaled += heat._unit < unit
        assert heat.values.max() <= 1e101
        last = [(turn - age) % 5 + 1 for age in range(min(turn + 1, 5))]
        assert order(heat) == last, f"after selection {turn}"
    assert rescaled >= 3
    assert heat.values[ids(*last[:2])][0] / heat.values[ids(*last[:2])][1] == pytest.approx(2.0)


# --- forget and move -------------------------------------------------------------------------------------------------


def test_pages_with_new_content_are_cold() -> None:
    heat = heat_of((1, 2, 3), (2,))
    heat.forget(ids(2, 4))
    assert order(heat) == [1, 3]
    heat.forget(ids())
    assert order(heat) == [1, 3]


@pytest.mark.parametrize(
    ("selections", "expected"),
    [
        pytest.param([(1,), (1,), (2,)], [0.0, "old"], id="old is hotter"),
        pytest.param([(1,), (2,), (2,)], [0.0, "new"], id="new is hotter"),
        pytest.param([(1,)], [0.0, "old"], id="new is cold"),
        pytest.param([(2,)], [0.0, "new"], id="old is cold"),
        pytest.param([(3,)], [0.0, 0.0], id="both are cold"),
    ],
)
def test_moved_content_keeps_the_larger(selections: list[tuple[int, ...]], expected: list[float | str]) -> None:
    heat = heat_of(*selections)
    before = {"old": heat.values[1], "new": heat.values[2]}
    third = heat.values[3]
    heat.move(1, 2)
    assert heat.values[ids(1, 2)].tolist() == [before.get(str(value), value) for value in expected]
    assert heat.values[3] == third


# --- hottest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "count", "expected"),
    [
        pytest.param([1, 2, 3, 4], 9, [3, 1, 2], id="all that were selected"),
        pytest.param([1, 2, 3, 4], 2, [3, 1], id="the best two"),
        pytest.param([1, 2, 3, 4], 0, [], id="none wanted"),
        pytest.param([4, 2, 5], 9, [2], id="of those given"),
        pytest.param([4, 5], 9, [], id="none was ever selected"),
        pytest.param([], 9, [], id="no pages"),
    ],
)
def test_hottest(pages: list[int], count: int, expected: list[int]) -> None:
    heat = heat_of((2, 1), (3, 1), (3,))
    assert heat.hottest(ids(*pages), count).tolist() == expected


def test_of_equally_hot_pages_the_first_given_come_first() -> None:
    heat = heat_of((1, 2, 3, 4))
    assert heat.hottest(ids(3, 1, 4, 2), 3).tolist() == [3, 1, 4]


@pytest.mark.parametrize("seed", range(30))
def test_the_lowest_are_the_first_of_all_in_order(seed: int) -> None:
    chance = np.random.default_rng(seed)
    first, then = chance.integers(0, 1 + seed % 4 * 5, 60) / 4, chance.integers(0, 1 + seed % 3 * 9, 60)
    pages = chance.permutation(60)[: chance.integers(0, 61)]
    in_order = sorted(pages.tolist(), key=lambda page: (first[page], then[page], page))
    for count in range(len(pages) + 2):
        assert lowest(pages, first, then, count).tolist() == in_order[:count]
