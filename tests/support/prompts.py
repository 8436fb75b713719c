"""Prompts: needles in repeated filler, and plain texts of many lengths, all made from seeds."""

from __future__ import annotations

import random
from dataclasses import dataclass

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
FILLER_TOKENS = 25
ADJECTIVES = ("amber", "brisk", "calm", "daring", "eager", "fuzzy", "gentle", "hollow", "ivory", "jolly", "keen")
NOUNS = ("falcon", "harbor", "lantern", "meadow", "orchard", "pebble", "quarry", "ribbon", "saddle", "timber", "valley")
WORDS = (*NOUNS, "river", "mountain", "copper", "letter", "garden", "winter", "signal", "market", "engine", "window")


@dataclass(frozen=True)
class Needle:
    """A long prompt with one number in it."""

    prompt: str
    answer: str
    depth: float

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]


def needle(tokens: int, depth: float, seed: int) -> Needle:
    """A prompt of about ``tokens`` tokens; the fact lies at ``depth`` (0 start, 1 end) of its filler."""
    rng = random.Random(seed)
    key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    value = str(rng.randint(10**6, 10**7 - 1))
    lines = [FILLER] * (tokens // FILLER_TOKENS)
    lines.insert(int(depth * len(lines)), f"One of the special magic numbers for {key} is: {value}.\n")
    question = f"What is the special magic number for {key} mentioned in the text above?"
    head = "Read the text below carefully. A special magic number is hidden in it; you will be asked for it later.\n\n"
    return Needle(head + "".join(lines) + "\n" + question, value, depth)


def prose(tokens: int, seed: int) -> str:
    """About ``tokens`` tokens of words that make no sense, different for every seed."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(tokens))


def random_ids(tokens: int, seed: int) -> list[int]:
    """Token ids that make no sense, different for every seed."""
    rng = random.Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(tokens)]
