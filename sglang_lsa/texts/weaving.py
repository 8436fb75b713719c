"""Texts with pieces put into them at known places."""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Iterator, Sequence

from sglang_lsa.texts.haystack import Haystack


def spread(rng: random.Random, number: int) -> list[float]:
    """Depths, one in each part of the context, in any order."""
    depths = [(part + rng.random()) / number for part in range(number)]
    rng.shuffle(depths)
    return depths


def fill(parts: Iterator[str], characters: int, joint: str) -> str:
    """As many of the parts as it takes for so many characters, at least one."""
    taken = [next(parts)]
    size = len(taken[0])
    while size < characters:
        taken.append(next(parts))
        size += len(joint) + len(taken[-1])
    return joint.join(taken)


def prose(rng: random.Random, characters: int, haystack: Haystack) -> str:
    """Running text that ends with a sentence, where it has any; draws from ``rng`` once."""
    text = haystack.draw(rng, characters)
    return text[: text.rfind(". ") + 1] or text


def weave(
    text: str, pieces: Sequence[tuple[float, str]], joint: str, breaks: str, before: str = ""
) -> tuple[str, list[tuple[int, int]]]:
    """A text with pieces put into it.

    Args:
        pieces: how deep (0 to 1), and what; put at the first break at that depth or after, in order of depth.
        joint: goes between a piece and what follows.
        breaks: pattern; places are where its matches end.
        before: what it begins with, before all pieces.

    Returns:
        The whole, and where the pieces are in it: characters from, to, in the order given.
    """
    text = text.strip() + joint
    places = [0, *(found.end() for found in re.finditer(breaks, text))]
    if places[-1] < len(text):
        places.append(len(text))
    parts, size, done = [before], len(before), 0
    spans = [(0, 0)] * len(pieces)
    for number in sorted(range(len(pieces)), key=lambda number: pieces[number][0]):
        depth, piece = pieces[number]
        place = places[min(bisect.bisect_left(places, depth * len(text)), len(places) - 1)]
        size += place - done
        spans[number] = (size, size + len(piece))
        parts += [text[done:place], piece, joint]
        size, done = size + len(piece) + len(joint), place
    return "".join([*parts, text[done:]]).removesuffix(joint), spans
