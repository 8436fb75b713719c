"""The third of four poems about owls: one of several answers to the same ask, to be repeated word for word.

The mechanics are of MRCR (arXiv 2409.12640, and OpenAI's data set of that name); the texts come from a grammar of our
own and resemble each other. A copy is 150 tokens or more, so that what is read moves on over several windows of 64.
MRCR has the model begin with a code, which small models get wrong; here the beginning of the answer is given.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

from sglang_lsa.evaluation.task import Made, Task, Turn
from sglang_lsa.texts.haystack import Haystack
from sglang_lsa.texts.weaving import fill, spread, weave

NEEDLES = (1, 2, 4, 8)
WORDS = 120
"""Words of a text, at least; the longest has 160."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
BEFORE = "This is a conversation between a user and an assistant.\n\n"

FORMS: dict[str, tuple[str, str]] = {
    "poem": (
        "O {topic} of {place}, this {mood} song is for you and for no one else.",
        "So ends the song of the {topic}.",
    ),
    "letter": (
        "Dear {person}, I have to tell you about the {topic} that came to {place}.",
        "Yours as ever, your {mood} friend.",
    ),
    "speech": (
        "Good people of {place}, we are here today because of the {topic}.",
        "Thank you all, and long live the {topic}.",
    ),
    "short story": (
        "Once there were {count} {topic} in {place}, and nobody knew why.",
        "And that was the end of it, said {person}.",
    ),
    "news report": (
        "The {topic} of {place} were seen again {time}, as {person} reports.",
        "More about the {topic} tomorrow.",
    ),
    "diary page": (
        "Today {person} and I walked to {place}, and there were {topic} all over.",
        "I am {mood} now, and go to bed.",
    ),
    "product review": (
        "I bought {count} {topic} in {place}, and I have used them since.",
        "Four stars of five for the {topic}.",
    ),
    "bedtime tale": (
        "Close your eyes and think of {place}, where the {topic} go to sleep.",
        "Good night, {mood} little one.",
    ),
    "weather report": (
        "Rain over {place} {time}, and the {topic} will be wet until noon.",
        "Stay {mood}, and stay dry.",
    ),
    "travel guide": (
        "Whoever comes to {place} should see the {count} {topic} first.",
        "Have a good journey, and greet {person}.",
    ),
}
"""How a text of each form begins and ends."""

SENTENCES = (
    "In {place}, {person} says, the {topic} are {look}, and {time} they are more {look2} still.",
    "{person} counted {count} of the {topic} {time}, and was {mood} about it for the rest of the week.",
    "Some call the {topic} {look}, some call them {look2}, but in {place} they are only called old.",
    "There is a {look} road from {place} to the sea, and the {topic} lie to the left of it.",
    "Nobody was as {mood} as {person} when the {count} {topic} were brought to {place}.",
    "If you ask {person}, the {topic} should be kept {look} and {look2}, and out of the sun.",
    "It was {person} who found that {topic} from {place} are as {look} as any others.",
    "{time}, the children of {place} draw the {topic} on the walls with {look} chalk.",
    "What makes the {topic} so {look} is a matter that {person} and {person2} do not agree about.",
    "For {count} years the {topic} stood in {place}, {look} and {look2}, and no one came to see them.",
    "Then {person} told {person2} that the {topic} had gone from {place}, and both of them were {mood}.",
    "The {look} ones among the {topic} cost {count} coins, and the {look2} ones cost a little less.",
    "I have heard {person} speak of the {topic} {time}, in a {mood} voice, as one speaks of home.",
    "Without the {topic}, {place} would be a {look} town like many, and {person} would not live there.",
)
SLOTS: dict[str, tuple[str, ...]] = {
    "place": (
        "Aldmoor",
        "Brask",
        "Corrin",
        "Dunwick",
        "Estrel",
        "Farrow",
        "Gannet Bay",
        "Hollin",
        "Ivel",
        "Jarrow Hill",
    ),
    "person": ("Agnes", "Bertil", "Clara", "Dov", "Edda", "Fergus", "Greta", "Hamid", "Imre", "Juno"),
    "look": ("round", "heavy", "bright", "crooked", "dusty", "narrow", "green", "hollow", "smooth", "pale"),
    "mood": ("happy", "quiet", "proud", "tired", "curious", "patient", "sleepy", "cheerful", "anxious", "calm"),
    "time": ("in spring", "at dawn", "every Sunday", "after the harvest", "late at night", "in the first snow"),
    "count": ("three", "seven", "nine", "eleven", "twelve", "twenty", "thirty", "forty", "sixty", "ninety"),
}
TOPICS = (
    "owls", "lanterns", "rivers", "umbrellas", "pumpkins", "clocks", "foxes", "bridges", "kettles", "violins",
    "mushrooms", "ladders", "herons", "bicycles", "candles", "harbours", "onions", "mirrors", "beetles", "windmills",
    "trains", "pebbles", "scarves", "cathedrals", "turtles", "anchors", "orchards", "puppets", "glaciers", "buttons",
    "kites", "lemons", "statues", "swallows", "barrels", "tunnels", "pillows", "spoons", "fountains", "meadows",
)  # fmt: skip


def make(rng: random.Random, characters: int, haystack: Haystack, needles: int) -> Made:
    """A conversation with the same ask in it so many times, and a request for one of the answers."""
    own = random.Random(rng.getrandbits(64))
    form, topic = rng.choice(list(FORMS)), rng.choice(TOPICS)
    depths = sorted(spread(rng, needles))
    texts = [write(random.Random(rng.getrandbits(64)), form, topic) for _ in depths]
    wanted = rng.randrange(needles)
    pieces = [(depth, ask(form, topic) + text) for depth, text in zip(depths, texts, strict=True)]
    room = characters - sum(len(piece) for _, piece in pieces)
    context, spans = weave(fill(chatter(own, form, topic), room, "\n\n"), pieces, "\n\n", r"\n\n", BEFORE)
    text, stop = texts[wanted], spans[wanted][1]
    others = [other for other in texts if other != text]
    if needles == 1:  # what a text of this kind has in common with any other
        others = [write(random.Random(rng.getrandbits(64)), form, topic) for _ in range(2)]
    which = f"{form} about {topic}" if needles == 1 else f"{ORDINALS[wanted]} {form} about {topic}"
    turn = Turn(
        f"Repeat, word for word, the {which} of the conversation above.",
        (text, *others),
        new_tokens=int(len(text.split()) * 1.5) + 30,
        metric="copied",
        evidence=((stop - len(text), stop),),
        start=f"Here is the {which}:\n\n",
        golden=text,
    )
    return Made(context, (turn,), depth=(stop - len(text)) / len(context))


def ask(form: str, topic: str) -> str:
    return f"User: Write a {form} about {topic}.\nAssistant: "


def chatter(rng: random.Random, form: str, topic: str) -> Iterator[str]:
    """Other asks with their answers, some of them of the same form or about the same topic."""
    while True:
        other = (rng.choice([form, *FORMS]), rng.choice([topic] * 8 + list(TOPICS)))
        text = write(random.Random(rng.getrandbits(64)), *other)
        if other != (form, topic):
            yield ask(*other) + text


def write(rng: random.Random, form: str, topic: str) -> str:
    """A text of one paragraph, 120 to 160 words."""
    first, last = FORMS[form]
    body = iter(rng.sample(SENTENCES, len(SENTENCES)))
    said = [fill_slots(rng, first, topic)]
    end = fill_slots(rng, last, topic)
    while len(" ".join([*said, end]).split()) < WORDS:
        said.append(fill_slots(rng, next(body), topic))
    return " ".join([*said, end])


def fill_slots(rng: random.Random, sentence: str, topic: str) -> str:
    """A sentence with words in it, and a capital letter first."""
    words = {slot: rng.sample(options, 2) for slot, options in SLOTS.items()}
    first = {slot: pair[0] for slot, pair in words.items()}
    second = {f"{slot}2": pair[1] for slot, pair in words.items()}
    said = sentence.format(topic=topic, **first, **second)
    return said[0].upper() + said[1:]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mrcr", f"{needles}needle", functools.partial(make, needles=needles), least=2560) for needles in NEEDLES
    )
}
