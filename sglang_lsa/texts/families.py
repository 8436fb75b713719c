"""Kinds of prompts to record: each hides something in a long context and asks for it, or asks nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_lsa.texts.fitting import Span
from sglang_lsa.texts.haystack import Texts
from sglang_lsa.texts.words import (
    ASSIGNMENTS,
    FACTS,
    FILLER,
    LETTERS,
    LISTS,
    NOUNS,
    QUESTIONS,
    hexadecimal,
    name_of,
    number_of,
)


@dataclass(frozen=True)
class Made:
    """What a family makes; see :class:`sglang_lsa.texts.corpus.Prompt`."""

    text: str
    source: str
    question: str = ""
    answer: str = ""
    evidence: tuple[Span, ...] = ()


def running_text(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """Nothing is asked: what a model attends to while it reads on."""
    text, source = texts.draw(rng, characters)
    return Made(text, source)


def facts(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """A few facts in running text; all of one form, one or two are asked for."""
    text, source = texts.draw(rng, characters)
    return _hide(rng, split, text, source, rng.choice((1, 4, 8)))


def facts_in_filler(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """The same in repeated sentences."""
    text = (FILLER * (characters // len(FILLER) + 1))[:characters]
    return _hide(rng, split, text, "filler", rng.choice((1, 4)))


def pairs(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """A long list of random keys and values; some are asked for."""
    made = [(hexadecimal(rng), hexadecimal(rng)) for _ in range(characters // 26)]
    asked = rng.sample(made, min(6, len(made)))
    text = "{" + ", ".join(f'"{key}": "{value}"' for key, value in made) + "}"
    answer = "; ".join(f'"{key}": "{value}"' for key, value in asked)
    question = "Which values have these keys? " + ", ".join(key for key, _ in asked)
    return Made(text, "random", question, answer, _places(text, [f'"{key}": "{value}"' for key, value in asked]))


def records(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """A transcript of an agent that looked up many orders; later it is asked about some."""
    lines: list[str] = []
    orders: list[dict[str, str]] = []
    while sum(map(len, lines)) < characters:
        order = {
            "order": f"W{rng.randrange(10**6, 10**7)}",
            "item": name_of(rng, split),
            "price": f"{rng.randrange(100, 40_000) / 100:.2f}",
            "tracking": str(rng.randrange(10**11, 10**12)),
        }
        lines.append(f"user: look up order {order['order']}\ntool: {json.dumps(order)}\n")
        orders.append(order)
    asked = rng.sample(orders, min(3, len(orders)))
    question = " ".join(f"What is the tracking number of order {order['order']}, and its item?" for order in asked)
    answer = " ".join(f"Order {o['order']}: tracking {o['tracking']}, item {o['item']}." for o in asked)
    text = "".join(lines)
    return Made(text, "random", question, answer, _places(text, [json.dumps(order) for order in asked]))


def copying(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """A passage is to be repeated: attention moves through the context."""
    text, source = texts.draw(rng, characters)
    begin = rng.randrange(max(1, len(text) - 1200))
    passage = text[begin : begin + 1000]
    question = f"Repeat the passage that begins with: {passage[:60]!r}"
    return Made(text, source, question, passage, ((begin, begin + len(passage)),))


def several_values(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """Several facts of one name in running text; all are asked for."""
    text, source = texts.draw(rng, characters)
    name, count = name_of(rng, split), rng.randrange(2, 7)
    values = [number_of(rng) for _ in range(count)]
    sentences = [FACTS[split][-1].format(name=name, value=value) for value in values]
    whole = _scatter(rng, text, sentences)
    answer = f"For the {name} they are {', '.join(values)}."
    question = LISTS[split].format(name=name, count=count)
    return Made(whole, source, question, answer, _places(whole, sentences))


def one_of_many(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """Nothing but facts of one form, a line each; one or two are asked for."""
    kind = rng.randrange(len(FACTS[split]))
    asked_for = rng.choice((1, 2))
    lines: dict[str, tuple[str, str]] = {}
    own, size = random.Random(rng.getrandbits(64)), 0
    while size < characters or len(lines) < asked_for:
        name, value = f"{name_of(own, split)} {own.randrange(100, 1000)}", number_of(own)
        if name not in lines:
            lines[name] = value, FACTS[split][kind].format(name=name, value=value)
            size += len(lines[name][1]) + 1
    names = list(lines)
    asked = [names[int(rng.random() * len(names))] for _ in range(asked_for)]
    text = "\n".join(line for _, line in lines.values())
    question = " ".join(QUESTIONS[split][kind].format(name=name) for name in asked)
    answer = " ".join(f"For the {name} it is {lines[name][0]}." for name in asked)
    return Made(text, "random", question, answer, _places(text, [lines[name][1] for name in asked]))


def chains(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """Numbers are given to names, and passed on to others; all that have one number are asked for."""
    filler = rng.random() < 0.5
    text, source = (FILLER * (characters // len(FILLER) + 1))[:characters], "filler"
    if not filler:
        text, source = texts.draw(rng, characters)
    alphabet, length = LETTERS[split]
    lines: list[str] = []
    found: list[list[str]] = []
    values = [str(rng.randrange(10_000, 100_000)) for _ in range(rng.choice((1, 2, 3)))]
    hops = rng.randrange(2, 7)
    for value in values:
        names = ["".join(rng.choice(alphabet) for _ in range(length)) for _ in range(hops)]
        sources = [value, *names[:-1]]
        found.append([ASSIGNMENTS[split].format(name=n, source=s) for n, s in zip(names, sources, strict=True)])
        lines.append(", ".join(names))
    # Lines of one chain stay in order; those of several are mixed.
    owners = [chain for chain in range(len(found)) for _ in range(hops)]
    rng.shuffle(owners)
    ordered = [iter(chain) for chain in found]
    whole = _scatter(rng, text, [next(ordered[owner]) for owner in owners])
    question = f"Which names have the value {values[0]}, directly or through others? There are {hops}; give all."
    answer = f"The names with the value {values[0]} are {lines[0]}."
    return Made(whole, source, question, answer, _places(whole, found[0]))


FAMILIES: dict[str, Callable[[random.Random, str, Texts, int], Made]] = {
    "text": running_text,
    "facts": facts,
    "filler": facts_in_filler,
    "pairs": pairs,
    "records": records,
    "copying": copying,
    "values": several_values,
    "lines": one_of_many,
    "chains": chains,
}


def needle(rng: random.Random, split: str, texts: Texts, characters: int) -> Made:
    """One magic number in running text, in words that small models know. Only for evaluation: nothing trains on it."""
    text, source = texts.draw(rng, characters)
    word, value = rng.choice(NOUNS[split].split()), number_of(rng)
    sentence = f"One of the special magic numbers for {word} is: {value}."
    place = text.find("\n", rng.randrange(len(text) // 50, len(text) * 49 // 50)) + 1
    whole = f"{text[:place]}{sentence}\n{text[place:]}"
    question = f"What is the special magic number for {word} mentioned in the text above?"
    answer = f"The special magic number for {word} is {value}."
    return Made(whole, source, question, answer, _places(whole, [sentence]))


EVALUATION = {"needle": needle}
"""Families that are not for recordings."""


def _hide(rng: random.Random, split: str, text: str, source: str, count: int) -> Made:
    kind = rng.randrange(len(FACTS[split]))
    names: list[str] = []
    while len(names) < count:
        if (name := name_of(rng, split)) not in names:
            names.append(name)
    values = [number_of(rng) for _ in names]
    sentences = [FACTS[split][kind].format(name=name, value=value) for name, value in zip(names, values, strict=True)]
    whole = _scatter(rng, text, sentences)
    asked = rng.sample(range(count), min(2, count))
    question = " ".join(QUESTIONS[split][kind].format(name=names[i]) for i in asked)
    answer = " ".join(f"For the {names[i]} it is {values[i]}." for i in asked)
    return Made(whole, source, question, answer, _places(whole, [sentences[i] for i in asked]))


def _scatter(rng: random.Random, text: str, sentences: Sequence[str]) -> str:
    """The text with the sentences in it, in their order."""
    places = sorted(rng.sample(range(len(text) // 50, len(text) * 49 // 50), len(sentences)))
    pieces, last = [], 0
    for sentence, place in zip(sentences, places, strict=True):
        pieces += [text[last:place], " ", sentence, " "]
        last = place
    return "".join([*pieces, text[last:]])


def _places(text: str, parts: Sequence[str]) -> tuple[Span, ...]:
    return tuple((at := text.index(part), at + len(part)) for part in parts)
