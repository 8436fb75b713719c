"""Where the end of a text occurred before."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.prompt_lookup import (
    FEW,
    FIRST_LOOKS,
    LONGEST,
    LOOKS,
    MOST,
    Repeats,
    _longest,
    continued_at,
    pages_next,
    repeats,
)

A, B = list(range(100, 120)), list(range(200, 220))


def at(ids: list[int], least: int = 4) -> int | None:
    return continued_at(np.array(ids, dtype=np.int64), least)


@pytest.mark.parametrize(
    ("ids", "position"),
    [
        ([], None),
        ([1], None),
        ([1, 2, 3, 4], None),
        ([*A, *B], None),
        ([*A, *B, *A[:3]], None),
        ([*A, *B, *A[:4]], 4),
        ([*A, *B, *A[3:9]], 9),
        ([7, *A[:4], 8, *A[:4]], 5),
        ([*A, *B, *A], 20),
        ([1, 1, 1, 1], None),
        ([1, 1, 1, 1, 1], 4),
    ],
)
def test_the_end_of_a_text(ids: list[int], position: int | None) -> None:
    assert at(ids) == position


def test_the_longest_occurrence_counts() -> None:
    longer, shorter = [*A[:10], 1], [9, *A[5:10], 2]
    assert at([*longer, *shorter, *A[:10]]) == 10


def test_of_equal_ones_the_latest_counts() -> None:
    assert at([*A, *B, *A, *A[3:9]]) == 49
    repeated = list(range(1000, 1000 + LONGEST))
    assert at([5, *repeated, *B, 6, *repeated, *A, 5, *repeated]) == len(repeated) * 2 + len(B) + 2


@pytest.mark.parametrize("least", [1, LONGEST - 1, LONGEST])
def test_as_many_tokens_as_are_asked_for_must_occur(least: int) -> None:
    part = list(range(1000, 1000 + least))
    assert at([7, *part, *A, 8, *part], least) == least + 1
    assert at([7, *part[1:], *A, 8, *part], least) is None
    assert at([*part[1:], *A, 8, *part], least) is None


def test_of_very_many_occurrences_the_latest_count() -> None:
    assert at([7] * 100_000, 6) == 99_999
    few = [7] * (MOST + 2 * LONGEST)
    assert at([*few, 8, *few]) == 2 * len(few)


def test_whatever_the_text_the_occurrence_is_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = rng.integers(0, 3, rng.integers(1, 60))
        found = continued_at(ids, 3)
        possible = [n for n in range(3, len(ids)) if (ids[n - 3 : n] == ids[-3:]).all()]
        assert (found is None) == (not possible)
        assert found is None or found in possible


@pytest.mark.parametrize(
    ("start", "tokens", "pages"),
    [(0, 1, [0]), (0, PAGE_SIZE, [0, 1]), (56, 64, [1]), (57, 64, [1, 2]), (3 * PAGE_SIZE + 10, 80, [3, 4])],
)
def test_pages_that_come_next(start: int, tokens: int, pages: list[int]) -> None:
    context = np.arange(1000, 1000 + 10 * PAGE_SIZE)
    text = np.concatenate((context, context[start : start + 8]))
    assert pages_next(text, 8, tokens, PAGE_SIZE).tolist() == pages


@pytest.mark.parametrize(("page", "pages"), [(16, [6, 7, 8, 9, 10]), (64, [1, 2]), (256, [0])])
def test_pages_of_other_sizes_come_next(page: int, pages: list[int]) -> None:
    context = np.arange(1000, 2000)
    assert pages_next(np.concatenate((context, context[100:108])), 8, 64, page).tolist() == pages


def test_no_page_comes_next() -> None:
    assert pages_next(np.arange(1000), 8, 64, PAGE_SIZE).tolist() == []


# --- does it repeat its prompt ---------------------------------------------------------------------------------------

PROMPT = list(range(1000, 1640))


def how(answer: list[int], least: int = 6, tokens: int = 64) -> Repeats | None:
    return repeats(np.array([*PROMPT, *answer], dtype=np.int64), len(PROMPT), least, tokens)


def reads_at(answer: list[int], least: int = 6, tokens: int = 64) -> int | None:
    found = how(answer, least, tokens)
    return None if found is None else found.at


def test_a_copy_reads_after_what_it_has_copied() -> None:
    assert [reads_at(PROMPT[100 : 100 + n]) for n in (5, 6, 40, 64, 200)] == [None, 106, 140, 164, 300]


def test_a_list_reads_after_its_last_entry_though_its_end_is_its_own() -> None:
    entries = [PROMPT[start : start + 16] for start in (100, 180, 260, 340)]
    answer = [token for number, entry in enumerate(entries) for token in (*entry, 7, 8 + number)]
    assert continued_at(np.array([*PROMPT, *answer]), 6) is None
    assert reads_at(answer) in range(346, 357)


def test_words_of_its_own_repeat_nothing() -> None:
    assert reads_at([]) is None
    assert reads_at(list(range(200))) is None
    assert reads_at([*range(100), *PROMPT[100:106], *range(200, 258)]) is None, "one of eight places, by chance"
    assert reads_at([5] * 200) is None, "it repeats itself, not its prompt"
    assert reads_at([*PROMPT[100:164], *range(64)]) is None, "what it copied before its last window"
    assert reads_at([*range(32), *PROMPT[100:132]]) == 132, "it has begun to"


def test_an_occurrence_in_the_answer_does_not_hide_that_in_the_prompt() -> None:
    part = PROMPT[100:130]
    assert continued_at(np.array([*PROMPT, *part, 5, *part]), 6) == len(PROMPT) + 30
    assert reads_at([*part, 5, *part]) == 130


def test_windows_of_a_few_tokens_are_looked_at_everywhere() -> None:
    assert reads_at(PROMPT[100:140], tokens=LOOKS // 2) == 140
    assert reads_at([*PROMPT[100:140], 1], tokens=1) is None


def test_a_list_jumps_and_a_copy_does_not() -> None:
    copy = PROMPT[100:164]
    assert how(copy) == Repeats(164, False)
    skipping = [*PROMPT[100:120], *PROMPT[125:150], 7, *PROMPT[151:165]]
    assert how(skipping) == Repeats(165, False)
    far = [*PROMPT[100:120], 7, *PROMPT[300:320], 7, *PROMPT[500:520]]
    back = [*PROMPT[500:520], 7, *PROMPT[300:320], 7, *PROMPT[100:120]]
    assert how(far) == Repeats(520, True) and how(back) == Repeats(120, True)
    assert how(PROMPT[100:107]) == Repeats(107, True), "it may"


def test_whatever_the_answer_the_places_are_those_of_one_look_after_the_other() -> None:
    rng = np.random.default_rng(0)
    seen = unended = 0
    for _ in range(300):
        prompt, answer = int(rng.integers(1, 40)), int(rng.integers(0, 40))
        ids = rng.integers(0, 3, prompt + answer)
        if rng.random() < 0.3:
            ids[-1] = 3
        found = repeats(ids, prompt, 3, 16)
        ends = range(len(ids), max(prompt + 3, len(ids) - 15) - 1, -2)
        hits = [end for end in ends if any((ids[n - 3 : n] == ids[end - 3 : end]).all() for n in range(3, prompt + 1))]
        for ended in (True, False):
            if not ended and continued_at(ids, 3) is not None:
                continue
            may = ends if ended else ends[1:]  # its end occurs nowhere: it takes the place of none that may
            noticed = any(end in hits for end in may[:: max(1, -(-len(may) // FIRST_LOOKS))])
            told = noticed and len(hits) >= (1 if len(ends) <= 4 else 2)
            assert (repeats(ids, prompt, 3, 16, ended) is not None) == told
            unended += told and not ended
        if found is not None:
            assert (ids[found.at - 3 : found.at] == ids[hits[0] - 3 : hits[0]]).all() and 3 <= found.at <= prompt
            seen += 1
    assert 50 < seen < 250 and unended > 5


def test_an_end_that_occurs_nowhere_takes_the_place_of_no_look() -> None:
    """Of a list with words of its own between, three places are looked at that may tell."""
    eighths = range(7, -1, -1)  # of what was written, from the first to the last
    written = [range(8 * at, 8 * at + 8) if at in (0, 3, 6) else PROMPT[200 + 8 * at : 208 + 8 * at] for at in eighths]
    ids = np.concatenate((PROMPT, *written))
    assert continued_at(ids, 6) is None
    assert repeats(ids, len(PROMPT), 6, 64, ended=False) is not None


def one_token_after_the_other(ids: np.ndarray, ends: np.ndarray, least: int, longest: int) -> int | None:
    """What ``_longest`` says, in the plainest way."""
    matched = 1
    while len(ends) and matched < longest:
        if matched == FEW:
            ends = ends[-MOST:]
        longer = np.array([end for end in ends if end >= matched and ids[end - matched] == ids[-1 - matched]], np.int64)
        if not len(longer):
            break
        ends, matched = longer, matched + 1
    return int(ends[-1]) + 1 if len(ends) and matched >= least else None


@pytest.mark.parametrize("circle", [0, 1, 2, 7, 40, 64, 65])
def test_many_tokens_are_compared_at_once_as_one_after_the_other(circle: int) -> None:
    """Texts that are short, that begin with what is looked for, and that go round in circles, or nearly."""
    rng = np.random.default_rng(circle)
    for _ in range(400):
        ids = rng.integers(0, int(rng.integers(1, 6)), int(rng.integers(1, 200)))
        if circle:
            ids = np.concatenate((ids[: int(rng.integers(0, 9))], np.resize(ids[:circle], int(rng.integers(1, 300)))))
            ids[rng.integers(0, len(ids), int(rng.integers(0, 4)))] = 9
        ids = np.concatenate((ids, ids[: int(rng.integers(1, 90))]))
        ends = np.flatnonzero(ids[: int(rng.integers(0, len(ids)))] == ids[-1])
        ends = ends[ends < len(ids) - 1]
        least, longest = int(rng.integers(1, LONGEST + 1)), int(rng.integers(1, LONGEST + 1))
        assert _longest(ids, ends, least, longest) == one_token_after_the_other(ids, ends, least, longest)
        ends = np.flatnonzero(ids[:-1] == ids[-1])
        assert continued_at(ids, least) == one_token_after_the_other(ids, ends, least, LONGEST)


def test_of_many_occurrences_that_agree_in_few_tokens_the_latest_are_looked_at() -> None:
    """The longest occurrence is the first, and is passed over."""
    end = list(range(1, 31))
    ids = np.array([*end, *(MOST * [0, *end[-FEW:]]), 0, *end])
    found = continued_at(ids, FEW)
    assert found == len(ids) - len(end) - 1
    assert found == one_token_after_the_other(ids, np.flatnonzero(ids[:-1] == ids[-1]), FEW, LONGEST)
    assert continued_at(np.delete(ids, slice(len(end), len(end) + FEW + 1)), FEW) == len(end), "one fewer"
