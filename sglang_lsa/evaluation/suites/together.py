"""Many questions about one document, which are asked at the same time; each is answered from places of its own.

Needles as in RULER, one or six for each question, all in one haystack. Answers are lists that go on for some windows:
the number is said again and again, or that of the next key is said.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from sglang_lsa.evaluation.suites.ruler import distinct, fork, hide, listed, needle, number, words
from sglang_lsa.evaluation.task import Made, Task, Turn
from sglang_lsa.texts.haystack import Haystack
from sglang_lsa.texts.weaving import spread

NEW_TOKENS = 192
"""Three windows."""
SENTENCES = 6
"""Of an answer, some 24 tokens each."""
INTRO = "The text below gives magic numbers for some names. Remember them for a question after it.\n\n"


@dataclass(frozen=True)
class Questions:
    """So many questions about one haystack.

    Attributes:
        questions: how many turns.
        asked: keys that each of them asks for, at depths all over the text.
        among: the haystack is other needles, a line each; else essays.
    """

    questions: int
    asked: int = 1
    among: bool = False

    def __call__(self, rng: random.Random, characters: int, haystack: Haystack) -> Made:
        total = self.questions * self.asked
        keys, values = distinct(lambda: words(rng), total), distinct(lambda: number(rng), total)
        needles = [needle("number", *item) for item in zip(keys, values, strict=True)]
        depths = spread(rng, total)
        own, room = fork(rng), max(0, characters - len(INTRO) - sum(len(each) + 1 for each in needles))
        hay = _other_needles(own, set(keys), room) if self.among else haystack.sentences(own, room)
        context, spans = hide(INTRO, hay, needles, depths, "\n" if self.among else " ")
        turns = []
        for first in range(0, total, self.asked):
            mine = slice(first, first + self.asked)
            turns.append(_turn(keys[mine], tuple(values[mine]), tuple(spans[mine])))
        return Made(context, tuple(turns), together=True)


def _turn(keys: list[str], values: tuple[str, ...], spans: tuple[tuple[int, int], ...]) -> Turn:
    if len(keys) == 1:
        asked = f"Which magic number does the text above give for {keys[0]}? Say it in a sentence, and"
        how = f"repeat this sentence, so that your answer is a list of {SENTENCES} sentences, numbered from 1."
    else:
        asked = f"Which magic numbers does the text above give for {listed(keys)}?"
        how = (
            f"Answer with a list of {len(keys)} sentences, one for each of these names in this order, numbered from 1."
        )
    start = f"1. The magic number for {keys[0]} in the text is"
    question = f"{asked} {how}"
    return Turn(question, values, NEW_TOKENS, start=start, evidence=spans)


def _other_needles(rng: random.Random, keys: set[str], characters: int) -> list[str]:
    lines, size = list[str](), 0
    while size < characters:
        if (key := words(rng)) not in keys:
            lines.append(needle("number", key, number(rng)))
            size += len(lines[-1]) + 1
    return lines


KINDS: dict[str, Callable[[int], Questions]] = {
    "one": lambda questions: Questions(questions),
    "several": lambda questions: Questions(questions, asked=SENTENCES),
    "among": lambda questions: Questions(questions, among=True),
}
"""What is asked, by name, for a number of questions."""


def task(kind: str, questions: int) -> Task:
    """Documents of one kind with so many questions; the length is that of one prompt with its answer."""
    return Task("together", kind, KINDS[kind](questions), by_turn=True)
