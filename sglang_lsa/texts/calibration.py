"""The prompts of a calibration: always the same ones, of the training split, none of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_lsa.texts.corpus import Tokens, make_prompts


@dataclass(frozen=True)
class PromptSet:
    """Which prompts.

    Attributes:
        lengths: tokens at most.
        each: of every family and length.
        families: see ``texts.families``; all of them ask for known parts of a long context.
    """

    lengths: tuple[int, ...]
    each: int
    families: tuple[str, ...] = ("facts", "filler", "pairs", "records", "values", "lines")


ON_GPU = PromptSet((2048, 4096, 8192), 2)
"""36 prompts, 172K tokens."""
ON_CPU = PromptSet((1536,), 1, ("facts", "pairs", "records", "lines"))
"""Four prompts, 6K tokens: a model of 135M parameters takes 12 s on two cores."""


def prompts_for(device: str, longest: int) -> PromptSet:
    """The set for a device, without what a model with contexts of ``longest`` tokens cannot take."""
    chosen = ON_CPU if device == "cpu" else ON_GPU
    return PromptSet(tuple(length for length in chosen.lengths if length <= longest), chosen.each, chosen.families)


def calibration_prompts(tokenizer: Any, chosen: PromptSet) -> list[Tokens]:
    """Their tokens, shortest first.

    Raises:
        ValueError: a tokenizer makes other lengths of them.
    """
    return [tokens for _, tokens in make_prompts(tokenizer, "train", chosen.lengths, chosen.each, chosen.families)]
