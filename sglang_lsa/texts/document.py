"""Documents for the demo: filler sentences over and over, or running text, and one fact hidden in each."""

from __future__ import annotations

import bisect
import pathlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from sglang_lsa.texts.fitting import pages_of
from sglang_lsa.texts.haystack import Haystack

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""Repeated as in the noise haystack of RULER (Hsieh et al., 2024)."""

INSTRUCTION = (
    "A special magic number is hidden in the text below. "
    "Read it and remember the number, I will ask for it afterwards.\n\n"
)


MOST_CHARACTERS = 8
"""Of a token of running text, on average; it is about 5."""


@dataclass(frozen=True)
class Fact:
    """What one document hides, and where: ``depth`` is the fraction of the text in front of it.

    ``speech`` is the seed by which its running text is drawn from the speeches that come with the package; None hides
    the fact between repeated filler.
    """

    word: str
    number: str
    depth: float
    document_tokens: int
    speech: int | None = None

    @property
    def sentence(self) -> str:
        return f"One of the special magic numbers for {self.word} is: {self.number}."


# The deeper the fact, the longer the prefix that a document of filler shares with the one before it, and need not
# prefill. All are longer than contexts that are read whole.
FACTS = (
    Fact("harbor", "7316452", 0.40, 4300),
    Fact("violin", "5307281", 0.55, 4400),
    Fact("lantern", "2958714", 0.55, 4400, speech=1),
)


@dataclass(frozen=True)
class Document:
    """A text of about ``fact.document_tokens`` tokens that hides ``fact``."""

    fact: Fact
    text: str
    tokens: int


@dataclass(frozen=True)
class Question:
    """One question about a document. The document comes first, so that questions about it share it as prefix."""

    document: Document
    wording: str

    @cached_property
    def text(self) -> str:
        return self.wording.format(word=self.document.fact.word)

    @cached_property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{self.document.text}\n\n{self.text}"}]

    def answered_by(self, answer: str) -> bool:
        """Whether the hidden number is in ``answer``."""
        return self.document.fact.number in answer


def load_tokenizer(model: pathlib.Path) -> Any:
    """The model's own tokenizer, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def build_document(tokenizer: Any, fact: Fact) -> Document:
    """Write the document of ``fact``; its length is within one round of filler, or one sentence, of what was asked for.

    Raises:
        ValueError: the document is too short to hold instruction, fact and filler.
    """
    fixed = count_tokens(tokenizer, INSTRUCTION) + count_tokens(tokenizer, " " + fact.sentence)
    sentences = list(_sentences(tokenizer, fact.speech, fact.document_tokens - fixed))
    if not sentences:
        raise ValueError(f"document_tokens {fact.document_tokens} leaves no room for filler: use {fixed + 100} or more")
    ends = list(accumulate(len(sentence) for sentence in sentences))
    sentences.insert(bisect.bisect(ends, fact.depth * ends[-1]), fact.sentence)
    text = INSTRUCTION + " ".join(sentences)
    return Document(fact, text, count_tokens(tokenizer, text))


def _sentences(tokenizer: Any, speech: int | None, room: int) -> Iterator[str]:
    """As many as there is room for, in tokens."""
    if speech is None:
        yield from [FILLER] * (room // count_tokens(tokenizer, " " + FILLER))
        return
    for sentence in Haystack().sentences(random.Random(speech), room * MOST_CHARACTERS)[1:]:  # the first is cut
        room -= count_tokens(tokenizer, " " + sentence)
        if room < 0:
            return
        yield sentence


def count_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def prompt_tokens(tokenizer: Any, question: Question) -> int:
    """Tokens of the prompt as the server sees it, chat template included."""
    return count_tokens(tokenizer, _prompt(tokenizer, question))


def fact_pages(tokenizer: Any, question: Question) -> list[int]:
    """Positions, in pages of the prompt, of the pages that hold the hidden fact."""
    prompt = _prompt(tokenizer, question)
    starts = [start for start, _ in tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]]
    sentence = question.document.fact.sentence
    return list(pages_of([(0, len(sentence))], prompt.index(sentence), starts))


def _prompt(tokenizer: Any, question: Question) -> str:
    return tokenizer.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
