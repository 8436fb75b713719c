"""Reading: what a prefill pass reads before its own tokens, from masks over its pages to slots of the pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.reading import Reading

PAGES = np.array([7, 3, 9, 4], dtype=np.int64)
"""Virtual pages of a prefix of four pages, in order of position."""
FULL, PARTLY = 4 * PAGE_SIZE, 3 * PAGE_SIZE + 10
"""Tokens of a prefix that fills them, and of one that begins the last."""


def mask(*positions: int) -> np.ndarray:
    found = np.zeros(len(PAGES), dtype=bool)
    found[list(positions)] = True
    return found


def page_map() -> np.ndarray:
    """Where virtual pages are: page 7 at 2, 3 at 5, 9 at 1 and 4 at 6."""
    v2p = np.zeros(12, dtype=np.int64)
    v2p[PAGES] = [2, 5, 1, 6]
    return v2p


@pytest.mark.parametrize(
    ("prefix", "here", "streamed", "tokens_here"),
    [
        pytest.param(FULL, [0, 1, 2, 3], [], FULL, id="all here"),
        pytest.param(FULL, [], [0, 1, 2, 3], 0, id="all streamed"),
        pytest.param(FULL, [1, 3], [0, 2], 2 * PAGE_SIZE, id="some here"),
        pytest.param(FULL, [0, 3], [], 2 * PAGE_SIZE, id="some left out"),
        pytest.param(PARTLY, [0, 1, 2, 3], [], PARTLY, id="partly filled, all here"),
        pytest.param(PARTLY, [3], [0, 1, 2], 10, id="partly filled, others streamed"),
        pytest.param(PARTLY, [1], [0, 2], PAGE_SIZE, id="partly filled, left out"),
        pytest.param(PARTLY, [1, 3], [], PAGE_SIZE + 10, id="partly filled, others left out"),
        pytest.param(3 * PAGE_SIZE + 1, [3], [0, 1, 2], 1, id="one token in the last page"),
        pytest.param(FULL - 1, [2, 3], [0, 1], 2 * PAGE_SIZE - 1, id="one token missing in the last page"),
    ],
)
def test_of(prefix: int, here: list[int], streamed: list[int], tokens_here: int) -> None:
    reading = Reading.of(PAGES, prefix, mask(*here), mask(*streamed), PAGE_SIZE)
    assert reading.prefix == prefix
    assert reading.here.tolist() == PAGES[here].tolist()
    assert reading.streamed.tolist() == PAGES[streamed].tolist()
    assert reading.tokens_here == tokens_here
    assert reading.whole == (tokens_here == prefix)
    assert len(reading.slots(page_map())) == tokens_here


@pytest.mark.parametrize("prefix", [3 * PAGE_SIZE + 1, PARTLY, FULL - 1])
def test_a_partly_filled_page_cannot_be_streamed(prefix: int) -> None:
    with pytest.raises(ValueError, match=f"the last page of {prefix} tokens is not complete and cannot be read from"):
        Reading.of(PAGES, prefix, mask(0, 1), mask(2, 3), PAGE_SIZE)


def test_nothing_before() -> None:
    none = np.zeros(0, dtype=np.int64)
    for reading in (
        Reading.of(none, 0, none.astype(bool), none.astype(bool), PAGE_SIZE),
        Reading.all_of(none, 0, PAGE_SIZE),
    ):
        assert (reading.tokens_here, len(reading.here), len(reading.streamed)) == (0, 0, 0)
        assert reading.whole
        assert reading.slots(page_map()).tolist() == []


@pytest.mark.parametrize("prefix", [FULL, PARTLY, 3 * PAGE_SIZE + 1])
def test_all_of(prefix: int) -> None:
    reading = Reading.all_of(PAGES, prefix, PAGE_SIZE)
    assert reading.whole
    assert (reading.here.tolist(), reading.streamed.tolist(), reading.tokens_here) == (PAGES.tolist(), [], prefix)


@pytest.mark.parametrize("prefix", [FULL, PARTLY, 3 * PAGE_SIZE + 1])
def test_all_in_place_is_the_same_however_it_is_said(prefix: int) -> None:
    everything = mask(0, 1, 2, 3)
    by_masks, directly = (
        Reading.of(PAGES, prefix, everything, ~everything, PAGE_SIZE),
        Reading.all_of(PAGES, prefix, PAGE_SIZE),
    )
    assert by_masks.whole and by_masks.tokens_here == directly.tokens_here
    assert torch.equal(by_masks.slots(page_map()), directly.slots(page_map()))


# --- slots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [FULL, PARTLY], ids=["full", "partly filled"])
@pytest.mark.parametrize("here", [[0, 1, 2, 3], [1, 3], [0, 2], [3]], ids=str)
def test_slots_are_those_of_the_tokens_in_their_order(prefix: int, here: list[int]) -> None:
    v2p = page_map()
    slots = Reading.of(PAGES, prefix, mask(*here), mask(), PAGE_SIZE).slots(v2p)
    assert slots.dtype == torch.int64
    tokens = [t for t in range(prefix) if t // PAGE_SIZE in here]
    assert slots.tolist() == [int(v2p[PAGES[t // PAGE_SIZE]]) * PAGE_SIZE + t % PAGE_SIZE for t in tokens]


def test_slots_follow_the_map() -> None:
    """They are looked up when the pass is queued, not when it was decided what it reads."""
    reading, v2p = Reading.all_of(PAGES[:1], PAGE_SIZE, PAGE_SIZE), page_map()
    assert reading.slots(v2p)[0] == 2 * PAGE_SIZE
    v2p[PAGES[0]] = 8
    assert reading.slots(v2p)[0] == 8 * PAGE_SIZE
