"""QMSum (arXiv 2104.05938): questions about meetings, of its published files, with the turns that matter marked.

Answers are summaries in the words of one annotator, which no rule here can judge: nothing is scored. What an arm kept
of the marked turns (``evidence_kept``) and how far it is from full attention (``kl``) need no judge.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from sglang_lsa.evaluation.suites.published import records, seen
from sglang_lsa.evaluation.task import Count, Sample, Turn

SUITE = "qmsum"
KEYS: dict[str, type | tuple[type, ...]] = {"specific_query_list": list, "meeting_transcripts": list}
NEW_TOKENS = 64
"""Of a summary: more than one window of LSA."""
MARKS = re.compile(r"\{\w+\}")
"""Noises and slips that transcribers marked, such as ``{vocalsound}``."""


def load(path: pathlib.Path, count: Count) -> Iterator[Sample]:
    """One sample a meeting, in the file's order: its specific questions, independent of each other.

    Raises:
        ValueError: it is not such a file.
    """
    for number, record in enumerate(records(path, KEYS)):
        try:
            said = [
                f"{turn['speaker']}: {' '.join(MARKS.sub(' ', turn['content']).split())}"
                for turn in record["meeting_transcripts"]
            ]
            starts = [0, *accumulate(len(line) + 1 for line in said)]
            turns = tuple(_asked(query, said, starts) for query in record["specific_query_list"])
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{path}: meeting {number} is not as published ({type(error).__name__}: {error}; its questions are "
                f"{seen(record['specific_query_list'])}): give QMSum's test.jsonl or val.jsonl"
            ) from None
        if not turns:
            continue
        context = "\n".join(said)
        tokens = count(context) + max(count(turn.question) for turn in turns) + NEW_TOKENS
        yield Sample(f"{SUITE}-meeting-{number}", SUITE, "meeting", tokens, context, turns, together=True)


def _asked(query: Any, said: list[str], starts: list[int]) -> Turn:
    spans = []
    for first, last in query["relevant_text_span"]:
        begin, end = int(first), int(last)
        if not 0 <= begin <= end < len(said):
            raise ValueError(f"turns {begin} to {end} of {len(said)}")
        spans.append((starts[begin], starts[end] + len(said[end])))
    question = f"{query['query'].strip()}\nAnswer in a few sentences from the meeting above."
    return Turn(question, (), NEW_TOKENS, "any", evidence=tuple(spans))
