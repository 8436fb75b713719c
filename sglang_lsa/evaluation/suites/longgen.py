"""Long answers of which every line is from another place: what is read has to move on with what is written."""

from __future__ import annotations

import itertools
import random

from sglang_lsa.evaluation.haystack import Haystack
from sglang_lsa.evaluation.suites.weaving import SENTENCE, prose, weave
from sglang_lsa.evaluation.task import Made, Task, Turn

ENTRIES = 60
ASKED = 20
TOKENS = 24
"""That one entry takes, at most."""
THINGS = (
    "lantern", "kettle", "anvil", "violin", "compass", "teapot", "saddle", "anchor", "clock", "ladder",
    "mirror", "basket", "hammer", "statue", "globe",
)  # fmt: skip
PLACES = (
    "Osaka", "Lima", "Turin", "Bergen", "Cairo", "Quito", "Malmo", "Perth", "Hanoi", "Tunis",
    "Graz", "Porto", "Dakar", "Leeds", "Minsk",
)  # fmt: skip


def make_listing(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """Numbered entries between sentences of running text, a third of which are to be repeated."""
    kinds = rng.sample(list(itertools.product(THINGS, PLACES)), ENTRIES)
    weights = rng.sample(range(100, 1000), ENTRIES)
    depths = sorted(rng.random() for _ in range(ENTRIES))
    first = rng.randrange(ENTRIES - ASKED + 1)
    wanted = slice(first, first + ASKED)
    entries = [
        f"Entry {number}: the {thing} of {place} weighs {weight} grams."
        for number, ((thing, place), weight) in enumerate(zip(kinds, weights, strict=True), start=1)
    ]
    text = prose(rng, characters - sum(len(entry) for entry in entries), haystack)
    context, spans = weave(text, list(zip(depths, entries, strict=True)), " ", SENTENCE)
    turn = Turn(
        f"The text above has numbered entries in it. Repeat the entries {first + 1} to {first + ASKED} word for word "
        "and in order, one on each line, and nothing else.",
        tuple(str(weight) for weight in weights[wanted]),
        new_tokens=ASKED * TOKENS,
        metric="all",
        evidence=tuple(spans[wanted]),
        golden="\n".join(entries[wanted]),
    )
    return Made(context, (turn,))


TASKS: dict[str, Task] = {
    "listing": Task("longgen", "listing", make_listing, least=2048),
}
