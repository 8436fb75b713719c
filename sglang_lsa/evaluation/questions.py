"""Samples as the model reads them: token ids of every turn, and the pages that its answer is from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang_lsa.evaluation.task import Sample, Turn
from sglang_lsa.texts.fitting import pages_of


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        turn: which of the sample's turns.
        ids: the prompt.
        evidence: pages of the prompt that the answer is in, ascending.
    """

    sample: Sample
    turn: int
    ids: tuple[int, ...]
    evidence: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.sample.name}-{self.turn}"

    @property
    def asked(self) -> Turn:
        return self.sample.turns[self.turn]


def questions(sample: Sample, tokenizer: Any) -> Iterator[Question]:
    """Every turn of a sample. In a conversation the right answers stand for those that were given before, as in
    SCBench, so that a wrong one counts once and all prompts are known before any is sent."""
    history: list[dict[str, str]] = []
    for number, turn in enumerate(sample.turns):
        first = not history
        said = f"{sample.context}\n\n{turn.question}" if first else turn.question
        messages = [*history, {"role": "user", "content": said}]
        ids, starts, text = read(messages, turn.start, tokenizer)
        before = text.index(sample.context)
        yield Question(sample, number, ids, pages_of(turn.evidence, before, starts))
        if not sample.together:
            history = [*messages, {"role": "assistant", "content": golden(turn)}]


def golden(turn: Turn) -> str:
    """What a conversation goes on with: the right answer."""
    return f"{turn.start} {turn.golden or ' '.join(turn.references)}".strip()


def read(messages: list[dict[str, str]], start: str, tokenizer: Any) -> tuple[tuple[int, ...], list[int], str]:
    """Token ids, where in the text each begins, and the text."""
    if getattr(tokenizer, "chat_template", None):
        text, special = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False
    else:
        text, special = "\n\n".join(message["content"] for message in messages) + "\n", True
    text += start
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return tuple(found.input_ids), [begin for begin, _ in found.offset_mapping], text
