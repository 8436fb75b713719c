"""Words and sentences of the tasks that are recorded; none of the training ones is in a held-out one."""

from __future__ import annotations

import random
import string

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


def name_of(rng: random.Random, split: str) -> str:
    return f"{rng.choice(ADJECTIVES[split].split())} {rng.choice(NOUNS[split].split())}"


def number_of(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def hexadecimal(rng: random.Random) -> str:
    return f"{rng.randrange(16**8):08x}"
