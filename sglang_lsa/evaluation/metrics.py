"""How answers are judged: each metric takes an answer and its references and returns a share of 1."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Sequence


def match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that are in the answer, whatever the case (RULER)."""
    found = answer.lower()
    return sum(reference.lower() in found for reference in references) / len(references)


def match_any(answer: str, references: Sequence[str]) -> float:
    """1 if one of the references is in the answer, whatever the case (RULER's questions, SCBench, NoLiMa)."""
    found = answer.lower()
    return float(any(reference.lower() in found for reference in references))


def first_number(answer: str, references: Sequence[str]) -> float:
    """1 if the first number of the answer is the reference (SCBench math find); commas in it do not count."""
    found = re.search(r"-?\d+", re.sub(r"(?<=\d),(?=\d{3})", "", answer))
    return float(found is not None and found.group() in references)


def copied(answer: str, references: Sequence[str]) -> float:
    """How much of a text was repeated (after MRCR).

    MRCR takes the plain likeness, of which a text of the same kind gets half. Here the likeness of the most similar
    other text counts as nothing, so that only the right one scores.

    Args:
        references: the text, and others that could be taken for it.
    """
    text, *others = (part.strip() for part in references)
    least = max((_likeness(other, text) for other in others), default=0.0)
    return max(0.0, (_likeness(answer.strip(), text) - least) / (1 - least))


@functools.lru_cache(1024)  # references are compared with each other for every answer
def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def words(answer: str, references: Sequence[str]) -> float:
    """1 if one of the references is in the answer as whole words, whatever the case and punctuation (BFCL's memory)."""

    def plain(text: str) -> str:
        return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "

    return float(any(plain(reference) in plain(answer) for reference in references))


def choice(answer: str, references: Sequence[str]) -> float:
    """1 if the first capital letter that stands alone, A to D, is the reference (LongBench-v2)."""
    found = re.search(r"\b([A-D])\b", answer)
    return float(found is not None and found.group(1) in references)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "all": match_all,
    "any": match_any,
    "first_number": first_number,
    "copied": copied,
    "choice": choice,
    "words": words,
}
