"""Five questions about one context, each answered from another place, as a conversation or as requests that share it.

The mechanics are of SCBench (arXiv 2412.10319); wording and data are our own. Keys are 8 hexadecimal digits, not UUIDs,
so that small models can repeat them.
"""

from __future__ import annotations

import random
import string
from dataclasses import replace

from sglang_lsa.evaluation.task import Made, Make, Task, Turn
from sglang_lsa.texts.haystack import SENTENCE, Haystack
from sglang_lsa.texts.weaving import fill, prose, spread, weave

TURNS = 5
CHAIN = 4
"""Variables that are equal, by way of each other."""
RANKS = ("largest", "second largest", "third largest", "smallest", "second smallest")


def make_kv(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """Values of keys, among pairs of the same form."""
    own = random.Random(rng.getrandbits(64))
    depths = spread(rng, TURNS)
    asked = {digits(rng): digits(rng) for _ in range(TURNS)}
    others = (pair(key, digits(own)) for key in iter(lambda: digits(own), "") if key not in asked)
    pieces = [(depth, pair(*item)) for depth, item in zip(depths, asked.items(), strict=True)]
    context, spans = weave(fill(others, characters, ",\n"), pieces, ",\n", r"\n", before="{\n")
    turns = tuple(
        Turn(
            f'In the data above, which value belongs to the key "{key}"? Answer with the value only.',
            (value,),
            new_tokens=40,
            metric="any",
            evidence=(span,),
        )
        for (key, value), span in zip(asked.items(), spans, strict=True)
    )
    return Made(context + "\n}", turns, depth=spans[0][0] / len(context))


def make_prefix_suffix(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """Strings of which the first and the last 4 letters are known, among some that share the ones or the others."""
    own = random.Random(rng.getrandbits(64))
    depths = spread(rng, TURNS)
    asked = [letters(rng, 16) for _ in range(TURNS)]
    pieces = list(zip(depths, asked, strict=True))
    for text in asked:
        pieces += [(rng.random(), text[:4] + letters(rng, 12)) for _ in range(2)]
        pieces += [(rng.random(), letters(rng, 12) + text[-4:]) for _ in range(2)]
    firsts = {text[:4] for text in asked}
    others = (text for text in iter(lambda: letters(own, 16), "") if text[:4] not in firsts)
    context, spans = weave(fill(others, characters, "\n"), pieces, "\n", r"\n")
    turns = tuple(
        Turn(
            f'Which line of the list above begins with "{text[:4]}" and ends with "{text[-4:]}"? '
            "Answer with the whole line only.",
            (text,),
            new_tokens=40,
            metric="any",
            evidence=(span,),
        )
        for text, span in zip(asked, spans[:TURNS], strict=True)
    )
    return Made(context, turns, depth=spans[0][0] / len(context))


def make_vt(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """Variables that are equal to a number or to each other, said in running text; each chain lies all over it."""
    text = prose(rng, characters, haystack)
    names: list[str] = []
    while len(names) < TURNS * CHAIN:
        name = letters(rng, 5).upper()
        names += [name] if name not in names else []
    values = [str(value) for value in rng.sample(range(10_000, 100_000), TURNS)]
    pieces: list[tuple[float, str]] = []
    for number, value in enumerate(values):
        chain = names[number * CHAIN : (number + 1) * CHAIN]
        said = [f"Let {name} be equal to {source}." for name, source in zip(chain, [value, *chain], strict=False)]
        pieces += zip(sorted(rng.random() for _ in chain), said, strict=True)
    context, spans = weave(text, pieces, " ", SENTENCE)
    turns = tuple(
        Turn(
            f"Sentences of the text above say what variables are equal to. Which {CHAIN} variables are equal to "
            f"{value}, at once or by way of others? Answer with their names only.",
            tuple(names[first : first + CHAIN]),
            new_tokens=30,
            metric="all",
            start="The variables are",
            evidence=tuple(spans[first : first + CHAIN]),
        )
        for value, first in zip(values, range(0, len(names), CHAIN), strict=True)
    )
    return Made(context, turns)


def make_math_find(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """Largest and smallest numbers of a list. Those asked for are outside the range of the others, and there once."""
    own = random.Random(rng.getrandbits(64))
    depths = spread(rng, TURNS)
    large = sorted(rng.sample(range(9800, 10_000), 3), reverse=True)
    small = sorted(rng.sample(range(1000, 1200), 2))
    asked = list(zip(RANKS, [*large, *small], strict=True))
    rng.shuffle(asked)
    others = (str(number) for number in iter(lambda: own.randrange(1200, 9800), 0))
    pieces = [(depth, str(number)) for depth, (_, number) in zip(depths, asked, strict=True)]
    context, spans = weave(fill(others, characters, ", "), pieces, ", ", " ")
    turns = tuple(
        Turn(
            f"What is the {rank} number of the list above? Answer with the number only.",
            (str(number),),
            new_tokens=6,
            metric="first_number",
            start="The number is",
            evidence=(span,),
        )
        for (rank, number), span in zip(asked, spans, strict=True)
    )
    return Made(context, turns, depth=spans[0][0] / len(context))


def shared(make: Make) -> Make:
    """The same sample, with independent requests for turns."""

    def make_shared(rng: random.Random, characters: int, haystack: Haystack) -> Made:
        return replace(make(rng, characters, haystack), together=True)

    return make_shared


def digits(rng: random.Random) -> str:
    """8 hexadecimal digits."""
    return f"{rng.getrandbits(32):08x}"


def letters(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=length))


def pair(key: str, value: str) -> str:
    return f'"{key}": "{value}"'


MAKES: dict[str, Make] = {
    "kv": make_kv,
    "prefix_suffix": make_prefix_suffix,
    "vt": make_vt,
    "math_find": make_math_find,
}
TASKS: dict[str, Task] = {
    task.name: task
    for name, make in MAKES.items()
    for task in (
        Task("scbench", name, make),
        Task("scbench", f"{name}_shared", shared(make), like=name),
    )
}
