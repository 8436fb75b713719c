"""What a suite gives: samples, each a long context and one or more turns about it, made to a length in tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from sglang_lsa.texts.fitting import Fit, Span
from sglang_lsa.texts.haystack import Haystack

Count = Callable[[str], int]
"""Tokens of a text."""


A_TURN = 16
"""Tokens that a chat template adds for every turn after the first."""


@dataclass(frozen=True)
class Turn:
    """One question and how its answer is judged.

    Attributes:
        question: of the user.
        references: right answers, or the parts of one; see ``metric``.
        new_tokens: how many the model may generate.
        metric: a name in ``metrics.METRICS``.
        start: words that the answer is made to begin with; they are in the prompt, not in the answer.
        evidence: where in the context the answer is: characters from, to.
        golden: what stands for the answer in the history of later turns; empty: the references, joined by spaces.
    """

    question: str
    references: tuple[str, ...]
    new_tokens: int
    metric: str = "all"
    start: str = ""
    evidence: tuple[Span, ...] = ()
    golden: str = ""


@dataclass(frozen=True)
class Sample:
    """One context with its turns.

    Attributes:
        name: letters, digits, hyphens and underscores; the same for the same suite, task, length and number.
        length: that was asked for, in tokens, of the prompt and the answer.
        context: what all turns are about.
        together: the turns are independent requests about one context, not a conversation.
        depth: of the evidence of the first turn, 0 (first) to 1 (last); None where there is no one place.
        averaged: whether it counts in averages.
    """

    name: str
    suite: str
    task: str
    length: int
    context: str
    turns: tuple[Turn, ...]
    together: bool = False
    depth: float | None = None
    averaged: bool = True


@dataclass(frozen=True)
class Made:
    """What a task makes; see :class:`Sample`."""

    context: str
    turns: tuple[Turn, ...]
    together: bool = False
    depth: float | None = None


Make = Callable[[random.Random, int, Haystack], Made]
"""Makes a sample of about so many characters; all random choices come from the generator given, whatever the size, so
that a longer sample is the same one with more around it."""


@dataclass(frozen=True)
class Task:
    """A way to make samples of any length.

    Attributes:
        make: see :data:`Make`.
        least: tokens below which it makes no sense.
        like: another task of the suite, whose samples have the same contexts and questions.
        averaged: whether it counts in the suite's average.
        by_turn: a sample is as long as its context and its longest turn, not all of its turns.
    """

    suite: str
    name: str
    make: Make
    least: int = 1024
    averaged: bool = True
    like: str = ""
    by_turn: bool = False

    def sample(self, length: int, number: int, haystack: Haystack, count: Count, overhead: int = 64) -> Sample:
        """Sample ``number`` of at most ``length`` tokens and at least 0.9 of it, with questions, answers, ``overhead``.

        Raises:
            ValueError: it cannot be made that long.
        """
        name = f"{self.suite}-{self.name}-{length}-{number}"
        if length < self.least:
            raise ValueError(f"{name}: {length} tokens are too few for this task: use {self.least} or more")
        seed = f"{self.suite}-{self.like or self.name}-{length}-{number}"
        fit = Fit(length, most=length * 16, tries=24)
        for characters in fit.sizes():
            made = self.make(random.Random(seed), characters, haystack)
            rooms = [(turn,) for turn in made.turns] if self.by_turn else [made.turns]
            asked = count(made.context) + max(_room(turns, count) for turns in rooms) + overhead
            if fit.fits(asked):
                shown = (made.context, made.turns, made.together, made.depth, self.averaged)
                return Sample(name, self.suite, self.name, length, *shown)
        raise ValueError(f"{name} cannot be made {length} tokens long (seen: {fit.tokens}): use another --lengths")


def _room(turns: tuple[Turn, ...], count: Count) -> int:
    """Tokens of a conversation beside its context."""
    said = "".join(turn.question + turn.start for turn in turns)
    return count(said) + sum(turn.new_tokens for turn in turns) + A_TURN * (len(turns) - 1)
