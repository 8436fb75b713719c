"""RULER's thirteen tasks (arXiv 2404.06654): its parameters and mechanics, in prompts, words and hay of our own.

Different on purpose, so scores are near RULER's but not the same: essays are the :class:`Haystack`; keys are of the
lists below; words to count are coined from syllables, since a dictionary has too few for long contexts; the last
document of a question is cut to fit. Every context comes before its question, so that it can be cached.
"""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sglang_lsa.evaluation.task import Made, Make, Task, Turn
from sglang_lsa.texts.haystack import Haystack

ADJECTIVES = (
    "ancient azure bitter blunt brave bright broad broken bronze careful cheap clever cloudy coarse cold cosmic "
    "curious damp daring dense distant double dull elegant famous fancy fierce floral fluent formal fragile frosty "
    "gentle golden graceful hasty heavy hidden hollow honest humble idle jagged jealous large lazy little lively "
    "lonely loud lucky modern muddy narrow noble odd orange pale patient plain polite proud purple quick quiet "
    "rapid rough round royal rural salty sandy secret sharp shiny silent simple slow smooth solid spicy steep "
    "sturdy sudden sweet swift tall tame tender thick tidy tiny tough urban vague vast vivid warm wild wise witty "
    "wooden young"
)
NOUNS = (
    "actor album apple arrow artist atlas autumn avenue bakery balcony balloon bamboo banana barrel beach beaver "
    "bench bicycle biscuit blanket blossom bottle bridge bucket buffalo butter button cabin camel camera canal "
    "canoe canyon carpet carrot castle cellar cherry chimney circus clarinet clock cloud coffee comet compass "
    "corner cottage cotton cradle cricket crystal curtain daisy desert diamond dragon drawer drum eagle elbow "
    "elephant envelope falcon farmer fence ferry flute forest fossil fountain fox galaxy garage garlic gate "
    "giraffe glacier glove grape guitar hawk helmet hill honey horse hotel iron ivory jewel judge kangaroo kitchen "
    "lake lamp lemon library lizard lobster lotus maple market mirror monkey mountain museum mushroom napkin ocean "
    "office olive otter owl painter palace panther parrot pencil penguin piano pigeon planet pocket pond potato "
    "prairie pumpkin rabbit radio rainbow river robin salmon school shadow shelf shovel spider spoon squirrel "
    "stable statue stream sugar sunset table teapot temple theater thunder tiger tomato tower tractor train "
    "trumpet tulip umbrella village volcano wagon whale wheel whistle willow windmill winter wizard zebra zipper"
)
NOISE = "The wind is mild. The lake is still. The hills are far. Off we walk. Up and down once more."
DEPTHS = tuple(round(100 * step / 39) / 100 for step in range(40))
"""Shares of the sentences that come before a needle."""
ONSETS, VOWELS, CODAS = "bdfgklmnprstvz", "aeiou", "lmnrs"
COINED = (len(ONSETS) * len(VOWELS) * len(CODAS)) ** 2
"""So many words can be coined."""
SHORT = 8_000
"""Characters of a list of words below which words are repeated less: 4,000 to 5,500 tokens, by how digits are split."""


def distinct(draw: Callable[[], str], number: int) -> list[str]:
    """That many different strings, as they are drawn; more begin with fewer."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[draw()] = None
    return list(found)


def words(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES.split())}-{rng.choice(NOUNS.split())}"


def number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randrange(10**6, 10**7))


def random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))


def coin(rng: random.Random) -> str:
    """A word of two syllables and six letters, so that none is a part of another: one of :data:`COINED`."""
    return "".join(rng.choice(part) for part in (ONSETS, VOWELS, CODAS) * 2)


def fork(rng: random.Random) -> random.Random:
    """A generator of its own for what is drawn as often as the size asks for; draws from ``rng`` once."""
    return random.Random(rng.getrandbits(64))


def shuffled(rng: random.Random, items: Iterable[str]) -> list[str]:
    """In random order; with the same generator, more items keep the order of the first ones."""
    return [item for _, item in sorted([(rng.random(), item) for item in items], key=lambda pair: pair[0])]


def hide(
    intro: str, hay: Sequence[str], needles: Sequence[str], depths: Sequence[float], between: str
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Needles among hay.

    Args:
        depths: of each needle: the share of the hay that comes before it. Needles of one place keep their order.

    Returns:
        The text, and where each needle is in it: characters from, to.
    """
    text, spans, done = intro, [(0, 0)] * len(needles), 0
    for each in sorted(range(len(needles)), key=depths.__getitem__):
        place = int(depths[each] * len(hay))
        text += "".join(part + between for part in hay[done:place])
        spans[each] = len(text), len(text) + len(needles[each])
        text += needles[each] + between
        done = place
    return (text + between.join(hay[done:])).rstrip(), tuple(spans)


def noise(characters: int) -> list[str]:
    """The same five sentences, a line each time."""
    return [NOISE] * max(1, characters // (len(NOISE) + 1))


@dataclass(frozen=True)
class Needles:
    """Magic numbers or UUIDs of keys, hidden in a haystack.

    Attributes:
        hay: ``noise``, ``essay`` or ``needles``: as many others of the same form as have room, a line each.
        key, value: what draws one.
        keys: that are hidden; ``asked`` of them are asked for.
        values: of each key; all are to be named.
    """

    hay: str
    key: Callable[[random.Random], str] = words
    value: Callable[[random.Random], str] = number
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, rng: random.Random, characters: int, haystack: Haystack) -> Made:
        kind = "uuid" if self.value is random_uuid else "number"
        keys = distinct(lambda: self.key(rng), self.keys)
        values = distinct(lambda: self.value(rng), self.keys * self.values)
        needles = [needle(kind, keys[each // self.values], value) for each, value in enumerate(values)]
        depths = [rng.random()] if self.hay == "needles" else rng.sample(DEPTHS, len(needles))
        intro = f"The text below gives magic {kind}s for some names. Remember them for a question after it.\n\n"
        hay, between = self._hay(rng, kind, keys, characters - len(intro) - sum(map(len, needles)), haystack)
        context, spans = hide(intro, hay, needles, depths, between)

        wanted = self.asked * self.values
        names, many = listed(keys[: self.asked]), wanted > 1
        question = f"Which magic {kind} does the text above give for {names}?"
        if many:
            question = f"Which magic {kind}s does the text above give for {names}? Name all {wanted} of them."
        start = f"The magic {kind}{'s' if many else ''} for {names} in the text {'are' if many else 'is'}"
        turn = Turn(question, tuple(values[:wanted]), 128, start=start, evidence=spans[:wanted])
        return Made(context, (turn,), depth=None if many else depths[0])

    def _hay(
        self, rng: random.Random, kind: str, keys: list[str], characters: int, haystack: Haystack
    ) -> tuple[list[str], str]:
        """Parts to hide needles between, and what separates them."""
        if self.hay == "noise":
            return noise(characters), "\n"
        if self.hay == "essay":
            return haystack.sentences(rng, characters), " "
        own, lines, size = fork(rng), list[str](), 0
        while size < characters:
            key = self.key(own)
            if key not in keys:
                lines.append(needle(kind, key, self.value(own)))
                size += len(lines[-1]) + 1
        return lines, "\n"


def needle(kind: str, key: str, value: str) -> str:
    return f"A magic {kind} for {key} is: {value}."


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def variables(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """A number is given to a variable in noise, and passed on to four others; a worked example comes first."""
    shown, value = distinct(lambda: str(rng.randrange(10_000, 100_000)), 2)
    example, names, _ = chain(rng, "Example:\n", shown, 3, 800)
    intro = (
        "Some lines below set a variable to a number, or to the value of another variable.\n\n"
        f"{example}\n\nIn the example, the 5 variables that have the value {shown} are: {', '.join(names)}\n\n"
    )
    context, names, spans = chain(rng, f"{intro}Text:\n", value, 5, characters - len(intro))
    question = (
        f"Which 5 variables of the text above, after the example, have the value {value}, "
        "be it set directly or through other variables? Name all of them."
    )
    start = f"The 5 variables that have the value {value} are:"
    return Made(context, (Turn(question, tuple(names), 30, start=start, evidence=spans),))


def chain(
    rng: random.Random, intro: str, value: str, length: int, characters: int
) -> tuple[str, list[str], tuple[tuple[int, int], ...]]:
    """Noise with five assignments of variables with names of that ``length``: text, names, and places in the text."""
    names = distinct(lambda: letters(rng, string.ascii_uppercase, length), 5)
    lines = [f"SET {name} = {source}" for source, name in pairwise([value, *names])]
    depths = sorted(rng.random() for _ in lines)
    text, spans = hide(intro, noise(characters - sum(map(len, lines))), lines, depths, "\n")
    return text, names, spans


def common_words(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """A numbered list in which ten words are more frequent than all others; a worked example comes first.

    In less than :data:`SHORT` characters the ten are there 6 times and the others once, else 30 and 3 times.
    """
    coined, first, second = fork(rng), fork(rng), fork(rng)
    shown, shown_often, shown_seldom = (20, 3, 1) if characters < SHORT else (40, 10, 3)
    often, seldom = (6, 1) if characters < SHORT else (30, 3)
    room = characters - 300 - 12 * (10 * shown_often + (shown - 10) * shown_seldom)
    entries = room // (9 + len(str(room // 12)))  # "123. word "
    rare = min(max(1, (entries - 10 * often) // seldom), COINED - 50)
    drawn = distinct(lambda: coin(coined), 40 + 10 + rare)
    example = numbered(first, drawn[:shown], shown_often, shown_seldom)
    context = (
        "In each list below, some words are there more often than the others.\n\n"
        f"Example list: {example}\n\nIts ten most frequent words are: {', '.join(drawn[:10])}\n\n"
        f"List: {numbered(second, drawn[40:], often, seldom)}"
    )
    question = "Which ten words are the most frequent in the list above, after the example? Name only the words."
    turn = Turn(question, tuple(drawn[40:50]), 120, start="Its ten most frequent words are:")
    return Made(context, (turn,))


def numbered(rng: random.Random, drawn: Sequence[str], often: int, seldom: int) -> str:
    """A shuffled list: the first ten words ``often`` times, the others ``seldom`` times."""
    entries = (word for place, word in enumerate(drawn) for _ in range(often if place < 10 else seldom))
    return " ".join(f"{place}. {word}" for place, word in enumerate(shuffled(rng, entries), 1))


def frequent_words(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """Words of six random letters, the one of rank ``n`` as often as a zeta distribution of exponent 2 has it.

    The most frequent one is written as dots, and the next three are asked for.

    RULER's limit of the vocabulary, one word for 50 tokens, is more than ever get into a text of that length.
    """
    coined, seed = fork(rng), rng.getrandbits(64)
    total = int(characters / 5.18)  # 0.61 of the words are "... ", the others have six letters
    counts = [int(total * rank**-2 * 6 / math.pi**2) for rank in range(1, math.isqrt(total) + 4)]
    drawn = ["...", *distinct(lambda: letters(coined, string.ascii_lowercase, 6), len(counts) - 1)]
    placed = [
        (place.random(), word)
        for rank, (word, count) in enumerate(zip(drawn, counts, strict=True))
        for place in (random.Random(seed + rank),)
        for _ in range(count)
    ]
    text = " ".join(word for _, word in sorted(placed))
    context = f"The text below is in a code of made-up words; dots stand between them and mean nothing.\n\n{text}"
    question = "Which three words are the most frequent in the coded text above, leaving out the dots?"
    return Made(context, (Turn(question, tuple(drawn[1:4]), 50, start="Its three most frequent words are:"),))


MAKES: dict[str, Make] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value=random_uuid),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key=random_uuid, value=random_uuid),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, asked=4),
    "vt": variables,
    "cwe": common_words,
    "fwe": frequent_words,
}
TASKS = {name: Task("ruler", name, make) for name, make in MAKES.items()}
"""The tasks that need nothing but a haystack; for the other two see ``ruler_qa``."""
