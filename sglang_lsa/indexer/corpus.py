"""Prompts to record: texts of the user's own, and tasks in which known parts of a long context are asked for.

Every prompt belongs to one split, by the document that it is made from: nothing of a held-out document, and none of the
words and sentences of held-out tasks, is in a training prompt.
"""

from __future__ import annotations

import bisect
import json
import pathlib
import random
import string
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_lsa.config import PAGE_SIZE

HELD_OUT_SHARE = 5
"""One document of so many is held out."""

NOUNS = {
    "train": "harbor violin lantern meadow quarry ribbon saddle timber valley copper anchor basket candle engine "
    "feather garden hammer island jacket kettle ladder magnet needle orchard pepper rocket silver tunnel velvet window",
    "held-out": "acorn badger cactus dolphin ember fiddle goblet igloo jungle lagoon marble nectar oyster pillow "
    "quartz raven socket turtle vessel walnut bonnet crater easel fabric",
}
ADJECTIVES = {
    "train": "amber brisk calm dusty eager fuzzy giant happy icy jolly",
    "held-out": "bold crisp dim early faint grim humid keen lush mild",
}
FACTS = {
    "train": ("The access code of the {name} is {value}.", "Note that the {name} was given the number {value}."),
    "held-out": ("Somebody wrote {value} on the door of the {name}.",),
}
QUESTIONS = {
    "train": ("What is the access code of the {name}?", "Which number was the {name} given?"),
    "held-out": ("What is written on the door of the {name}?",),
}
LISTS = {
    "train": "Which numbers were the {name} given? There are {count}; name all.",
    "held-out": "What is written on the door of the {name}? There are {count} numbers; give each.",
}
ASSIGNMENTS = {"train": "Let {name} be {source}.", "held-out": "{name} := {source}"}
LETTERS = {"train": (string.ascii_lowercase, 4), "held-out": (string.ascii_uppercase, 6)}
"""Of the names of variables: which, and how many."""
FILLER = "The river runs on. A cloud goes by. The road is long. Wait here a while. Then walk on again. "


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
    evidence: tuple[tuple[int, int], ...] = ()

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
        pages: set[int] = set()
        for first, stop in self.evidence:
            begin, end = (bisect.bisect_right(starts, before + at) - 1 for at in (first, stop - 1))
            pages.update(range(begin // PAGE_SIZE, end // PAGE_SIZE + 1))
        answer = len(starts) - bisect.bisect_left(starts, len(whole)) if self.answer else 0
        return Tokens(list(read.input_ids), answer, tuple(sorted(pages)))


@dataclass(frozen=True)
class Tokens:
    """A prompt as token ids, how many of the last ones are its answer, and the pages that the answer is from."""

    ids: list[int]
    answer: int
    evidence: tuple[int, ...]


class Texts:
    """Documents of one split: files of a folder (``.txt``, ``.md``, ``.rst``, ``.py``), or Python's own library.

    Raises:
        ValueError: the folder has no such files, or none for this split.
    """

    def __init__(self, split: str, folder: pathlib.Path | None = None):
        root = folder or pathlib.Path(sysconfig.get_paths()["stdlib"])
        patterns = ("**/*.txt", "**/*.md", "**/*.rst", "**/*.py") if folder else ("*.py",)
        files = sorted(path for pattern in patterns for path in root.glob(pattern))
        if not files:
            raise ValueError(f"--texts {root}: has no .txt, .md, .rst or .py files: give a folder of text files")
        held_out = split == "held-out"
        self.files = [
            path
            for path in files
            if (zlib.crc32(path.relative_to(root).as_posix().encode()) % HELD_OUT_SHARE == 0) == held_out
        ]
        if not self.files:
            raise ValueError(
                f"--texts {root}: {len(files)} files are too few to hold one of {HELD_OUT_SHARE} out: add more"
            )
        self.root = root

    def draw(self, rng: random.Random, characters: int) -> tuple[str, str]:
        """A piece of running text, from one document or, when it ends, several; and their names.

        With the same ``rng``, a longer one begins with the shorter.
        """
        text, names = "", list[str]()
        while len(text) < characters:
            path = rng.choice(self.files)
            whole = path.read_text(errors="ignore")
            begin = 0 if names else int(rng.random() * len(whole))
            text += whole[begin:] + "\n"
            names.append(path.relative_to(self.root).as_posix())
        return text[:characters], " ".join(names)


@dataclass(frozen=True)
class Made:
    """What a family makes; see :class:`Prompt`."""

    text: str
    source: str
    question: str = ""
    answer: str = ""
    evidence: tuple[tuple[int, int], ...] = ()


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
    made = [(_hex(rng), _hex(rng)) for _ in range(characters // 26)]
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
            "item": _name(rng, split),
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
    name, count = _name(rng, split), rng.randrange(2, 7)
    values = [_number(rng) for _ in range(count)]
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
        name, value = f"{_name(own, split)} {own.randrange(100, 1000)}", _number(own)
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
    word, value = rng.choice(NOUNS[split].split()), _number(rng)
    sentence = f"One of the special magic numbers for {word} is: {value}."
    place = text.find("\n", rng.randrange(len(text) // 50, len(text) * 49 // 50)) + 1
    whole = f"{text[:place]}{sentence}\n{text[place:]}"
    question = f"What is the special magic number for {word} mentioned in the text above?"
    answer = f"The special magic number for {word} is {value}."
    return Made(whole, source, question, answer, _places(whole, [sentence]))


EVALUATION = {"needle": needle}
"""Families that are not for recordings."""


def make_prompts(
    tokenizer: Any,
    split: str,
    lengths: Sequence[int],
    each: int,
    families: Sequence[str] = tuple(FAMILIES),
    texts: pathlib.Path | None = None,
) -> Iterator[tuple[Prompt, Tokens]]:
    """Prompts of every family and length, the same ones every time, with their tokens.

    Args:
        lengths: tokens of a prompt at most; it is at least nine tenths as long.
        each: prompts of each family and length.

    Raises:
        ValueError: see :class:`Texts`.
    """
    documents = Texts(split, texts)
    for length in lengths:
        for number in range(each):
            for family in families:
                yield _of_length(tokenizer, documents, family, split, length, number)


def _of_length(
    tokenizer: Any, texts: Texts, family: str, split: str, length: int, number: int
) -> tuple[Prompt, Tokens]:
    """Make the prompt shorter or longer until its tokens fit; all attempts draw the same random numbers."""
    name = f"{split}-{family}-{length}-{number}"
    characters = length * 3
    too_few, too_many = 0, length * 20
    for _ in range(20):
        made = {**FAMILIES, **EVALUATION}[family](random.Random(name), split, texts, characters)
        prompt = Prompt(name, family, split, made.source, made.text, made.question, made.answer, made.evidence)
        tokens = prompt.read_by(tokenizer)
        if length * 0.9 <= len(tokens.ids) <= length:
            return prompt, tokens
        if not prompt.question and len(tokens.ids) > length:
            return prompt, Tokens(tokens.ids[:length], 0, ())
        if len(tokens.ids) < length:
            too_few = characters
        else:
            too_many = characters
        wanted = max(100, int(characters * length * 0.96 / max(1, len(tokens.ids))))
        characters = wanted if too_few < wanted < too_many else (too_few + too_many) // 2
    raise ValueError(f"{name} cannot be made {length} tokens long (seen: {len(tokens.ids)}): use longer --lengths")


def _hide(rng: random.Random, split: str, text: str, source: str, count: int) -> Made:
    kind = rng.randrange(len(FACTS[split]))
    names: list[str] = []
    while len(names) < count:
        if (name := _name(rng, split)) not in names:
            names.append(name)
    values = [_number(rng) for _ in names]
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


def _places(text: str, parts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    return tuple((at := text.index(part), at + len(part)) for part in parts)


def _name(rng: random.Random, split: str) -> str:
    return f"{rng.choice(ADJECTIVES[split].split())} {rng.choice(NOUNS[split].split())}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _hex(rng: random.Random) -> str:
    return f"{rng.randrange(16**8):08x}"
