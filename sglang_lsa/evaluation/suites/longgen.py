"""Long answers, of lines from everywhere or of one passage: what is read has to move on with what is written."""

from __future__ import annotations

import itertools
import random

from sglang_lsa.evaluation.task import Made, Task, Turn
from sglang_lsa.texts.haystack import SENTENCE, Haystack, split_sentences
from sglang_lsa.texts.weaving import prose, weave

ENTRIES = 60
ASKED = 20
TOKENS = 24
"""That one entry takes, at most."""
PASSAGE = 3_000
"""Characters of a passage, at least: some 600 tokens, nine windows of 64."""
GIVEN = 6
"""Words of it that the answer is made to begin with."""
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


def make_passage(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """A letter between running text of the same kind, to be repeated as a whole."""
    letter, other = (passage(rng, haystack) for _ in range(2))
    depth, name = rng.random(), rng.choice(PLACES)
    framed = f"Here begins the letter to {name}.\n{letter}\nHere ends the letter to {name}."
    context, ((begin, stop),) = weave(prose(rng, characters - len(framed), haystack), [(depth, framed)], "\n", SENTENCE)
    begin, stop = begin + framed.index(letter), stop - (len(framed) - framed.index(letter) - len(letter))
    words = letter.split()
    rest = " ".join(words[GIVEN:])
    turn = Turn(
        f"In the text above is a letter to {name}. Repeat it word for word, from its first word to its last.",
        (rest, other),
        new_tokens=len(letter) // 4 + 16,
        metric="copied",
        start=" ".join(words[:GIVEN]),
        evidence=((begin, stop),),
        golden=rest,
    )
    return Made(context, (turn,), depth=begin / len(context))


def passage(rng: random.Random, haystack: Haystack) -> str:
    """Whole sentences of running text, single-spaced."""
    sentences = split_sentences(haystack.draw(rng, 3 * PASSAGE))[1:]
    taken = [sentences[0]]
    for sentence in sentences[1:]:
        if sum(map(len, taken)) + len(taken) >= PASSAGE:
            break
        taken.append(sentence)
    return " ".join(taken)


TASKS: dict[str, Task] = {
    "listing": Task("longgen", "listing", make_listing, least=2048),
    "passage": Task("longgen", "passage", make_passage, least=2560),
}
