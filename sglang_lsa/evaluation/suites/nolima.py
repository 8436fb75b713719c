"""A fact that has no word in common with the question: it is found by what it means.

The mechanics are of NoLiMa (arXiv 2502.05167); facts, names and wording are our own.
"""

from __future__ import annotations

import random

from sglang_lsa.evaluation.task import Made, Task, Turn
from sglang_lsa.texts.haystack import SENTENCE, Haystack
from sglang_lsa.texts.weaving import prose, weave

DEPTHS = 26
"""From first to last, equally far apart."""
NAMES = (
    "Ottilie", "Bram", "Saoirse", "Tancred", "Ysolde", "Marek", "Philippa", "Anselm", "Zuzanna", "Leopold",
    "Xiomara", "Torvald", "Beatrix", "Ignatius", "Rosalind", "Caspian", "Henrike", "Oswin", "Delphine", "Quillon",
)  # fmt: skip
"""None of them is in the speeches."""

LANDMARKS: tuple[tuple[str, str, str], ...] = (
    ("the Eiffel Tower", "Paris", "France"),
    ("the Brandenburg Gate", "Berlin", "Germany"),
    ("the Sagrada Familia", "Barcelona", "Spain"),
    ("the Colosseum", "Rome", "Italy"),
    ("the Acropolis", "Athens", "Greece"),
    ("the Hagia Sophia", "Istanbul", "Turkey"),
    ("the Charles Bridge", "Prague", "the Czech Republic"),
    ("the statue of the Little Mermaid", "Copenhagen", "Denmark"),
    ("the Atomium", "Brussels", "Belgium"),
    ("Schonbrunn Palace", "Vienna", "Austria"),
    ("the Fisherman's Bastion", "Budapest", "Hungary"),
    ("Wawel Castle", "Krakow", "Poland"),
    ("the Rijksmuseum", "Amsterdam", "the Netherlands"),
    ("the Belem Tower", "Lisbon", "Portugal"),
    ("Table Mountain", "Cape Town", "South Africa"),
    ("the statue of Christ the Redeemer", "Rio de Janeiro", "Brazil"),
    ("the Casa Rosada", "Buenos Aires", "Argentina"),
    ("the Burj Khalifa", "Dubai", "the United Arab Emirates"),
    ("the Petronas Towers", "Kuala Lumpur", "Malaysia"),
    ("the CN Tower", "Toronto", "Canada"),
    ("the Fushimi Inari shrine", "Kyoto", "Japan"),
    ("the Koutoubia Mosque", "Marrakesh", "Morocco"),
    ("the Vasa Museum", "Stockholm", "Sweden"),
    ("the Vigeland sculptures", "Oslo", "Norway"),
    ("Gyeongbokgung Palace", "Seoul", "South Korea"),
    ("the Taj Mahal", "Agra", "India"),
    ("the Ha'penny Bridge", "Dublin", "Ireland"),
    ("the Hallgrimskirkja", "Reykjavik", "Iceland"),
)
"""A sight, its city, its country."""
SIGHTS = (
    "Every morning {name} opens the curtains and looks out at {landmark}.",
    "From the kitchen window {name} can hear the visitors of {landmark}.",
    "At night the lamps of {landmark} shine on the bed of {name}.",
)
LIVES = "Which person in the text above lives in {place}? Answer with the name only."

HABITS: tuple[tuple[str, str], ...] = (
    ("{name} has not touched ham, beef or fish since childhood.", "is a vegetarian"),
    ("{name} feels ill after bread, beer and pasta.", "should avoid gluten"),
    ("{name} has stomach cramps after milk and ice cream.", "does not tolerate lactose"),
    ("{name} refuses even honey, eggs and cheese.", "is a vegan"),
    ("{name} injects insulin before each dinner.", "has diabetes"),
    ("{name} filled two cavities and pulled a molar before noon.", "is a dentist"),
    ("{name} takes the loaves out of the oven at four in the morning.", "is a baker"),
    ("{name} measured the hems and cut the cloth for three suits.", "is a tailor"),
    ("{name} looks after the hives and scrapes wax from the frames.", "keeps bees"),
    ("{name} watched the rings of Saturn through the big telescope.", "is an astronomer"),
    ("{name} nailed new shoes to the hooves of four horses.", "is a farrier"),
    ("{name} fixed the leaking taps and the blocked drain next door.", "is a plumber"),
)
"""What somebody does, and what that makes of them."""
IS = "Which person in the text above {what}? Answer with the name only."


def make_one_hop(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """The city of a landmark, or what a habit makes of somebody."""
    facts = [(sight(rng, landmark), LIVES.format(place=city)) for landmark, city, _ in LANDMARKS]
    facts += [(habit, IS.format(what=what)) for habit, what in HABITS]
    return hide(rng, characters, haystack, *rng.choice(facts))


def make_two_hop(rng: random.Random, characters: int, haystack: Haystack) -> Made:
    """The country of a landmark, by way of its city."""
    facts = [(sight(rng, landmark), LIVES.format(place=country)) for landmark, _, country in LANDMARKS]
    return hide(rng, characters, haystack, *rng.choice(facts))


def sight(rng: random.Random, landmark: str) -> str:
    return rng.choice(SIGHTS).replace("{landmark}", landmark)


def hide(rng: random.Random, characters: int, haystack: Haystack, needle: str, question: str) -> Made:
    """Running text with the needle, of somebody, at one of the depths."""
    text = prose(rng, characters, haystack)
    name = rng.choice(NAMES)
    depth = rng.randrange(DEPTHS) / (DEPTHS - 1)
    context, spans = weave(text, [(depth, needle.format(name=name))], " ", SENTENCE)
    return Made(context, (Turn(question, (name,), new_tokens=24, metric="any", evidence=tuple(spans)),), depth=depth)


TASKS: dict[str, Task] = {
    "one_hop": Task("nolima", "one_hop", make_one_hop),
    "two_hop": Task("nolima", "two_hop", make_two_hop),
}
