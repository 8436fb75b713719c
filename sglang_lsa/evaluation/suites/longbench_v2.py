"""LongBench-v2: questions with four choices about long documents (arXiv 2412.15204), of its published file."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from sglang_lsa.evaluation.suites.published import plain, records
from sglang_lsa.evaluation.task import Count, Sample, Turn

SUITE = "longbench_v2"
LENGTHS = ("short", "medium", "long")
"""Below 32 thousand words, below 128 thousand, and above."""
KEYS: dict[str, type | tuple[type, ...]] = dict.fromkeys(
    ("_id", "length", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "context"), str
)
START = "The right answer is ("
ASK = "The text above answers this question. Only one of the four choices is right."


def load(path: pathlib.Path, count: Count) -> Iterator[Sample]:
    """Samples of the published ``data.json``, in its order. The prompt's words are not the published ones.

    Raises:
        ValueError: it is not such a file.
    """
    for record in records(path, KEYS):
        name, length, answer = (record[key] for key in ("_id", "length", "answer"))
        if length not in LENGTHS:
            raise ValueError(f"{path}: {name}: length is {length!r}: make it one of {', '.join(LENGTHS)}")
        if answer not in ("A", "B", "C", "D"):
            raise ValueError(f"{path}: {name}: answer is {answer!r}: make it A, B, C or D")
        context = record["context"].strip()
        choices = "\n".join(f"({letter}) {record[f'choice_{letter}'].strip()}" for letter in "ABCD")
        question = f"{ASK}\n\nQuestion: {record['question'].strip()}\n{choices}"
        turn = Turn(question, (answer,), new_tokens=4, metric="choice", start=START)
        tokens = count(f"{context}\n\n{question}\n{START}")
        yield Sample(f"{SUITE}-{length}-{plain(name)}", SUITE, length, tokens, context, (turn,))
