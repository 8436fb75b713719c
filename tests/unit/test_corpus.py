"""Prompts to record: of the length asked for, the same every time, with evidence where it is, and splits apart."""

from __future__ import annotations

import pathlib

import pytest

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.demo.document import load_tokenizer
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.indexer.corpus import ADJECTIVES, FACTS, FAMILIES, NOUNS, SPLITS, Prompt, Texts, Tokens, make_prompts


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
