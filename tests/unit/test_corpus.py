"""Prompts to record: of the length asked for, the same every time, with evidence where it is, and splits apart."""

from __future__ import annotations

import pathlib
import random
import re

import pytest

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.texts.corpus import Prompt, Tokens, make_prompts
from sglang_lsa.texts.document import load_tokenizer
from sglang_lsa.texts.families import FAMILIES
from sglang_lsa.texts.haystack import Texts
from sglang_lsa.texts.words import ADJECTIVES, ASSIGNMENTS, FACTS, LETTERS, LISTS, NOUNS

SPLITS = tuple(NOUNS)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(embedded_model_path())
    tokenizer.model_max_length = 1 << 40
    return tokenizer


@pytest.fixture(scope="module")
def made(tokenizer) -> list[tuple[Prompt, Tokens]]:
    return [pair for split in SPLITS for pair in make_prompts(tokenizer, split, (600, 2000), 2)]


def test_lengths(made: list[tuple[Prompt, Tokens]]) -> None:
    for prompt, tokens in made:
        length = int(prompt.name.split("-")[-2])
        assert length * 0.9 <= len(tokens.ids) <= length, prompt.name
    assert len(made) == len({prompt.name for prompt, _ in made}) == 2 * 2 * 2 * len(FAMILIES)


def test_the_same_every_time(tokenizer, made: list[tuple[Prompt, Tokens]]) -> None:
    again = list(make_prompts(tokenizer, "train", (600,), 2))
    assert again == [pair for pair in made if pair[0].name.startswith("train") and "-600-" in pair[0].name]


def test_evidence_holds_what_the_answer_needs(tokenizer, made: list[tuple[Prompt, Tokens]]) -> None:
    for prompt, tokens in made:
        assert bool(prompt.question) == bool(tokens.evidence) == bool(tokens.answer)
        for first, _ in prompt.evidence:
            parts = [tokenizer.decode(tokens.ids[page * PAGE_SIZE :][: 2 * PAGE_SIZE]) for page in tokens.evidence]
            within = [part for part in parts if prompt.text[first : first + 8] in part]
            assert within, prompt.name
        if prompt.answer:
            answer = tokenizer.decode(tokens.ids[-tokens.answer :])
            assert answer.strip() == prompt.answer.strip()


def test_splits_share_nothing() -> None:
    train, held_out = (Texts(split) for split in SPLITS)
    assert not set(train.files) & set(held_out.files)
    assert len(held_out.files) > len(train.files) / 10
    for words in (NOUNS, ADJECTIVES):
        assert not set(words["train"].split()) & set(words["held-out"].split())
    assert not set(FACTS["train"]) & set(FACTS["held-out"])
    for sentences in (LISTS, ASSIGNMENTS, LETTERS):
        assert sentences["train"] != sentences["held-out"]


def test_texts_of_ones_own(tokenizer, tmp_path: pathlib.Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"page {number} of a book. " * 200)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    prompts = [prompt for prompt, _ in make_prompts(tokenizer, "train", (400,), 3, ("text",), tmp_path)]
    assert all("of a book" in prompt.text for prompt in prompts)
    assert all(source.endswith(".txt") for prompt in prompts for source in prompt.source.split())


def test_no_texts_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"has no \.txt"):
        Texts("train", tmp_path)
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match="too few"):
        Texts("held-out", tmp_path), Texts("train", tmp_path)


def test_too_short_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="use longer --lengths"):
        list(make_prompts(tokenizer, "train", (30,), 1, ("records",)))


@pytest.mark.parametrize("split", SPLITS)
def test_chains_lead_from_the_number_to_every_name(split: str) -> None:
    for seed in range(20):
        made = FAMILIES["chains"](random.Random(seed), split, Texts(split), 6000)
        value, names = re.search(r"\d{5}", made.question)[0], re.search(r" are (.*)\.$", made.answer)[1].split(", ")
        lines = [made.text[first:stop] for first, stop in made.evidence]
        assert len(lines) == len(names) == int(re.search(r"There are (\d)", made.question)[1])
        for line, name, source in zip(lines, names, [value, *names[:-1]], strict=True):
            assert line == ASSIGNMENTS[split].format(name=name, source=source)
        assert sorted(made.evidence) == list(made.evidence)


@pytest.mark.parametrize("split", SPLITS)
def test_every_value_is_in_the_answer(split: str) -> None:
    for seed in range(20):
        made = FAMILIES["values"](random.Random(seed), split, Texts(split), 6000)
        values = re.findall(r"\d{7}", made.answer)
        assert [re.search(r"\d{7}", made.text[first:stop])[0] for first, stop in made.evidence] == values
        assert len(values) == int(re.search(r"There are (\d)", made.question)[1])


@pytest.mark.parametrize("split", SPLITS)
def test_lines_that_are_asked_for_are_among_others_of_their_form(split: str) -> None:
    for seed in range(20):
        made = FAMILIES["lines"](random.Random(seed), split, Texts(split), 6000)
        lines = made.text.split("\n")
        asked = [made.text[first:stop] for first, stop in made.evidence]
        assert len(lines) > 60 and set(asked) <= set(lines)
        for line, value in zip(asked, re.findall(r"\d{7}", made.answer), strict=True):
            assert value in line
