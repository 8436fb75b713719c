"""Prompts to record: texts of the user's own, and tasks in which known parts of a long context are asked for.

Every prompt belongs to one split, by the document that it is made from: nothing of a held-out document, and none of the
words and sentences of held-out tasks, is in a training prompt.
"""

from __future__ import annotations

import bisect
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_lsa.texts.families import EVALUATION, FAMILIES
from sglang_lsa.texts.fitting import Fit, Span, pages_of
from sglang_lsa.texts.haystack import Texts


@dataclass(frozen=True)
class Prompt:
    """One prompt to record.

    Attributes:
        name: of its recording: letters, digits and hyphens.
        family, split: see the module.
        source: the document that it is made from.
        question: empty where nothing is asked.
        answer: its right answer, which is recorded as if the model had given it.
        evidence: where in the text the answer is from: characters from, to.
    """

    name: str
    family: str
    split: str
    source: str
    text: str
    question: str = ""
    answer: str = ""
    evidence: tuple[Span, ...] = ()

    def read_by(self, tokenizer: Any) -> Tokens:
        """The prompt as the model reads it: a chat turn and the answer to it, or plain text."""
        whole, special = self.text, True
        if self.question:
            whole = f"{self.text}\n\n{self.question}\n"
            if getattr(tokenizer, "chat_template", None):
                turn = [{"role": "user", "content": whole}]
                whole, special = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), False
        before = whole.index(self.text)
        read = tokenizer(whole + self.answer, add_special_tokens=special, return_offsets_mapping=True)
        starts = [start for start, _ in read.offset_mapping]
        answer = len(starts) - bisect.bisect_left(starts, len(whole)) if self.answer else 0
        return Tokens(list(read.input_ids), answer, pages_of(self.evidence, before, starts))


@dataclass(frozen=True)
class Tokens:
    """A prompt as token ids, how many of the last ones are its answer, and the pages that the answer is from."""

    ids: list[int]
    answer: int
    evidence: tuple[int, ...]


def make_prompts(
    tokenizer: Any,
    split: str,
    lengths: Sequence[int],
    each: int,
    families: Sequence[str] = tuple(FAMILIES),
    texts: pathlib.Path | None = None,
    first: int = 0,
    known: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[Prompt, Tokens]]:
    """Prompts of every family and length, the same ones every time, with their tokens.

    Args:
        lengths: tokens of a prompt at most; it is at least nine tenths as long.
        each: prompts of each family and length.
        first: number of the first of them; those of lower numbers are other prompts.
        known: names of prompts that are not made.

    Raises:
        ValueError: see :class:`Texts`.
    """
    documents = Texts(split, texts)  # before the first prompt is asked for
    return (
        _of_length(tokenizer, documents, family, split, length, name)
        for length in lengths
        for number in range(first, first + each)
        for family in families
        if not known(name := name_of(split, family, length, number))
    )


def name_of(split: str, family: str, length: int, number: int) -> str:
    """What a prompt and its recording are named."""
    return f"{split}-{family}-{length}-{number}"


def _of_length(tokenizer: Any, texts: Texts, family: str, split: str, length: int, name: str) -> tuple[Prompt, Tokens]:
    """Make the prompt shorter or longer until its tokens fit; all attempts draw the same random numbers."""
    fit = Fit(length, most=length * 20, tries=20, least=100)
    for characters in fit.sizes():
        made = {**FAMILIES, **EVALUATION}[family](random.Random(name), split, texts, characters)
        prompt = Prompt(name, family, split, made.source, made.text, made.question, made.answer, made.evidence)
        tokens = prompt.read_by(tokenizer)
        if fit.fits(len(tokens.ids)):
            return prompt, tokens
        if not prompt.question and len(tokens.ids) > length:
            return prompt, Tokens(tokens.ids[:length], 0, ())
    raise ValueError(f"{name} cannot be made {length} tokens long (seen: {fit.tokens}): use longer --lengths")
