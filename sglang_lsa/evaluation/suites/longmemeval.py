"""LongMemEval: questions about the history of a user's chats (arXiv 2410.10813), of its published files."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from sglang_lsa.evaluation.suites.published import plain, records, seen
from sglang_lsa.evaluation.task import Count, Sample, Turn

SUITE = "longmemeval"
TYPES = (
    "single-session-user",
    "single-session-assistant",
    "single-session-preference",
    "temporal-reasoning",
    "knowledge-update",
    "multi-session",
)
ABSTENTION = "abstention"
KEYS: dict[str, type | tuple[type, ...]] = {
    "question_id": str,
    "question_type": str,
    "question": str,
    "answer": (str, int, float),
    "question_date": str,
    "haystack_dates": list,
    "haystack_sessions": list,
}
UNKNOWN = (
    "did not mention",
    "didn't mention",
    "didn’t mention",
    "have not mentioned",
    "haven't mentioned",
    "haven’t mentioned",
    "not mentioned",
    "no mention",
    "no information",
    "not enough information",
    "not provided",
    "cannot be answered",
    "cannot answer",
    "can't answer",
    "can’t answer",
    "do not know",
    "don't know",
    "don’t know",
)
"""Words of those who abstain."""
ASK = "Answer in a few words. If the chats do not tell, say: You did not mention it."
NEW_TOKENS = 64

Evidence = tuple[tuple[int, int], ...]


def load(path: pathlib.Path, count: Count) -> Iterator[Sample]:
    """Samples of ``longmemeval_s``, ``_m`` or ``_oracle``, in its order; the task is the type of the question.

    The published judge is an LLM; this one looks for the answer in what was said, word for word. So scores are not
    comparable with published ones, only with each other: a right answer in other words counts as wrong, a short
    reference such as "3" is in many wrong answers, and what is to be right of type ``single-session-preference`` is a
    description, which no answer has in it. Abstention is right for whoever lost the evidence: it is in no average. The
    evidence is labelled by turns, so recall of selectors is comparable.

    Raises:
        ValueError: it is not such a file.
    """
    for record in records(path, KEYS):
        name, kind = record["question_id"], record["question_type"]
        if kind not in TYPES:
            raise ValueError(f"{path}: {name}: question_type is {kind!r}: make it one of {', '.join(TYPES)}")
        abstains = name.endswith("_abs")
        task = ABSTENTION if abstains else kind
        context, evidence = transcript(record, f"{path}: {name}")
        question = (
            f"These were chats of a user with an assistant. Today is {record['question_date']}, and the user asks: "
            f"{record['question'].strip()}\n{ASK}"
        )
        references = UNKNOWN if abstains else answers(str(record["answer"]))
        turn = Turn(question, references, NEW_TOKENS, "any", evidence=evidence)
        depth = evidence[0][0] / len(context) if len(evidence) == 1 else None
        tokens = count(f"{context}\n\n{question}")
        title = f"{SUITE}-{task}-{plain(name)}"
        yield Sample(title, SUITE, task, tokens, context, (turn,), depth=depth, averaged=not abstains)


def transcript(record: dict[str, Any], where: str) -> tuple[str, Evidence]:
    """All sessions, oldest first, and where the turns are that have the answer.

    Raises:
        ValueError: sessions are not as published; ``where`` says in which record.
    """
    dates, sessions = record["haystack_dates"], record["haystack_sessions"]
    if len(dates) != len(sessions):
        raise ValueError(f"{where}: {len(dates)} haystack_dates for {len(sessions)} haystack_sessions: give as many")
    text, evidence = "", []
    for date, session in sorted(zip(dates, sessions, strict=True), key=lambda pair: str(pair[0])):
        text += f"[Chat of {date}]\n"
        for turn in turns(session, where):
            begin = len(text)
            text += f"{turn['role'].capitalize()}: {turn['content'].strip()}"
            if turn.get("has_answer"):
                evidence.append((begin, len(text)))
            text += "\n"
        text += "\n"
    return text.rstrip(), tuple(evidence)


def turns(session: object, where: str) -> Sequence[dict[str, Any]]:
    """The turns of a session, with role and content."""
    if not isinstance(session, list):
        raise ValueError(f"{where}: a session is {seen(session)}: make it a list of turns")
    for turn in session:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: a turn is {seen(turn)}: give it a role and content, both text")
    return session


def answers(answer: str) -> tuple[str, ...]:
    """Right answers; "7 days. 8 days (including the last day) is also acceptable." holds two."""
    found = re.fullmatch(r"(.+?)\. (.+?)(?: \(.*\))? (?:is|are) also acceptable\.?", answer.strip(), re.DOTALL)
    return found.groups() if found else (answer.strip().rstrip("."),)
