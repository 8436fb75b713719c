"""Samples of an evaluation, as tests make them."""

from __future__ import annotations

from sglang_lsa.evaluation.task import Sample, Turn


def sample(together: bool = False, turns: int = 2) -> Sample:
    context = " ".join(f"Line {number} says {number * 7}." for number in range(400))
    asked = []
    for turn in range(turns):
        part = f"Line {100 + turn * 200} says"
        at = context.index(part)
        asked.append(
            Turn(
                f"What does line {100 + turn * 200} say?",
                (str((100 + turn * 200) * 7),),
                20,
                start="It says",
                evidence=((at, at + len(part) + 5),),
            )
        )
    return Sample("toy-lines-4096-0", "toy", "lines", 4096, context, tuple(asked), together)
