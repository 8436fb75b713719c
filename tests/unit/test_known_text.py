"""The text that is looked up is the one that the scheduler knows, however it changes."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_lsa.engine.known_text import ROOM, KnownText
from sglang_lsa.patches.requests import text_of


def plain(prompt: array, answer: array, tokens: int) -> list[int]:
    return [*prompt, *answer][:tokens]


@pytest.mark.parametrize("seed", range(5))
def test_it_is_prompt_and_answer(seed: int) -> None:
    """Which grows, is cut, changes in place, or belongs to another prompt."""
    chance = np.random.default_rng(seed)
    req = SimpleNamespace(origin_input_ids=array("q", range(50)), output_ids=array("q"))
    text = text_of(req)
    for _ in range(200):
        what = chance.integers(6)
        if what < 3:
            req.output_ids.extend(chance.integers(0, 1000, chance.integers(0, 3 * ROOM // 100)).tolist())
        elif what == 3:
            req.output_ids = req.output_ids[: chance.integers(0, len(req.output_ids) + 1)]
        elif what == 4 and req.output_ids:
            req.output_ids[chance.integers(len(req.output_ids))] = 7
        elif what == 5:
            req.origin_input_ids = array("q", chance.integers(0, 1000, chance.integers(0, 90)).tolist())
        tokens = int(chance.integers(0, 90 + len(req.output_ids)))
        assert text(tokens).tolist() == plain(req.origin_input_ids, req.output_ids, tokens)


@pytest.mark.parametrize(("prompt", "answer"), [([1 << 31], []), ([1], [1 << 40]), ([1], [-(1 << 31) - 1]), ([], [])])
def test_ids_that_need_more_bytes_get_them(prompt: list[int], answer: list[int]) -> None:
    text, kept = KnownText(), array("q", prompt)
    assert text.first(9, kept, array("q")).tolist() == prompt
    assert text.first(9, kept, array("q", answer)).tolist() == [*prompt, *answer]


def test_a_prompt_is_copied_once() -> None:
    text, prompt = KnownText(), array("q", range(1000))
    first = text.first(1000, prompt, array("q"))
    assert first.dtype == np.int32
    for generated in range(1, ROOM, 500):
        assert np.shares_memory(text.first(2000, prompt, array("q", range(generated))), first)
    grown = text.first(2 * ROOM, prompt, array("q", range(ROOM + 1)))
    assert grown.tolist() == [*range(1000), *range(ROOM + 1)] and not np.shares_memory(grown, first)
