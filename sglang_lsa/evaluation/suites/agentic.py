"""What agents read: memories of users (BFCL-v4) and a bank's handbook (tau2), of packages that the user installs."""

from __future__ import annotations

import importlib.util
import pathlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_lsa.evaluation.suites.published import plain, records, seen
from sglang_lsa.evaluation.task import Count, Sample, Turn

SUITE = "agentic"
SCENARIOS = ("customer", "finance", "healthcare", "notetaker", "student")
"""Of BFCL-v4's memory; each is one user."""
BANKING = pathlib.Path("tau2", "data", "domains", "banking_knowledge")
OVERHEAD = 64
"""Tokens of a chat template."""
NEW_TOKENS = 32
LEAST_WORDS = 3
"""Of a quotation that was found."""
SAME = str.maketrans("’‘“”—–\u00a0İ", "''\"\"-- i")
"""What to read as the same; and the one character of which the small letter is two."""

Span = tuple[int, int]


def find(package: str) -> pathlib.Path | None:
    """Folder of an installed package, by its name in Python (no dots), without importing it; None: there is none."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return pathlib.Path(folders[0]) if folders else None


@dataclass(frozen=True)
class Session:
    """What a user said in one session, with a heading; ``user`` is the scenario."""

    user: str
    text: str


@dataclass(frozen=True)
class Asked:
    """A question to one scenario's memory, its right answers, and words of the sessions that tell."""

    question: str
    answers: tuple[str, ...]
    source: str


class Unsuitable(ValueError):
    """There are no samples of this length."""


def bfcl_memory(folder: pathlib.Path, count: Count, length: int | None = None) -> Iterator[Sample]:
    """One sample a scenario of ``bfcl_eval``: all that one user said, and independent questions about it.

    The published benchmark has the model keep notes with tools; here it reads all that was said, so scores are not
    comparable with published ones.

    Args:
        folder: of the package; see :func:`find`.
        length: tokens to fill with sessions of other users, in between; scenarios that are longer are left out. None:
            no others, whatever the length.

    Raises:
        ValueError: files are missing or not as published; or all scenarios are longer, or too short together.
    """
    data = folder / "data"
    sessions = [session for scenario in SCENARIOS for session in read_sessions(data, scenario)]
    asked = read_questions(data)
    sizes = [size_of(session.text, count) for session in sessions]
    made = 0
    for scenario in SCENARIOS:
        own = [session.user == scenario for session in sessions]
        prompts = [ask(scenario, each) for each in asked[scenario]]
        around = max(count(prompt) for prompt in prompts) + NEW_TOKENS + OVERHEAD
        needed = around + sum(size for size, of_user in zip(sizes, own, strict=True) if of_user)
        if length is not None and needed > length:
            continue
        name = f"{SUITE}-memory-{length}-{scenario}" if length else f"{SUITE}-memory-{scenario}"
        rng = random.Random(f"{SUITE}-memory-{scenario}")
        kept = own if length is None else fill(rng, sizes, own, length - around, name)
        ordered = [sessions[place] for place in interleave(rng, sessions) if kept[place]]
        context = "\n\n".join(session.text for session in ordered)
        turns = tuple(
            Turn(prompt, each.answers, NEW_TOKENS, "words", evidence=evidence(each, scenario, ordered))
            for prompt, each in zip(prompts, asked[scenario], strict=True)
        )
        made += 1
        yield Sample(name, SUITE, "memory", length or needed, context, turns, together=True)
    if not made:
        raise Unsuitable(f"{length} tokens are too few for any scenario of {data}: use a longer length")


def read_sessions(data: pathlib.Path, scenario: str) -> Iterator[Session]:
    """A scenario's sessions, in their order."""
    path = data / "memory_prereq_conversation" / f"memory_{scenario}.json"
    user = user_of(scenario)
    for number, record in enumerate(records(path, {"id": str, "question": list}), start=1):
        said = [f"{user}: {' '.join(text.split())}" for text in said_in(record, path)]
        yield Session(scenario, "\n".join([f"[Session {number} of {user}]", *said]))


def read_questions(data: pathlib.Path) -> dict[str, list[Asked]]:
    """Questions of each scenario."""
    path, answers_path = data / "BFCL_v4_memory.json", data / "possible_answer" / "BFCL_v4_memory.json"
    keys = {"id": str, "ground_truth": list, "source": str}
    answers = {record["id"]: record for record in records(answers_path, keys)}
    found: dict[str, list[Asked]] = {scenario: [] for scenario in SCENARIOS}
    for record in records(path, {"id": str, "question": list, "scenario": str}):
        name, scenario = record["id"], record["scenario"]
        if scenario not in found:
            raise ValueError(f"{path}: {name}: scenario is {scenario!r}: make it one of {', '.join(SCENARIOS)}")
        if name not in answers or not answers[name]["ground_truth"]:
            raise ValueError(f"{answers_path}: no answer to {name}: give the files of one version")
        right = tuple(str(answer) for answer in answers[name]["ground_truth"])
        found[scenario].append(Asked(" ".join(said_in(record, path)), right, answers[name]["source"]))
    lacking = [scenario for scenario, questions in found.items() if not questions]
    if lacking:
        raise ValueError(f"{path}: no questions of {', '.join(lacking)}: give the published file")
    return found


def said_in(record: dict[str, Any], path: pathlib.Path) -> list[str]:
    """Texts of the messages of all turns."""
    try:
        return [message["content"].strip() for turn in record["question"] for message in turn]
    except (TypeError, KeyError, AttributeError):
        value = seen(record["question"])
        raise ValueError(f"{path}: {record['id']}: question is {value}: make it lists of messages") from None


def user_of(scenario: str) -> str:
    """A letter, because real names and the scenarios' names are answers to questions."""
    return f"User {chr(ord('A') + SCENARIOS.index(scenario))}"


def ask(scenario: str, asked: Asked) -> str:
    """The question as the model reads it."""
    return f"All this was said to an assistant. A question of {user_of(scenario)}: {asked.question}\nAnswer briefly."


def interleave(rng: random.Random, sessions: Sequence[Session]) -> list[int]:
    """Places of all sessions, users in between each other, those of one user in their order."""
    turns = [session.user for session in sessions]
    rng.shuffle(turns)
    left = {user: [place for place, session in enumerate(sessions) if session.user == user] for user in set(turns)}
    return [left[user].pop(0) for user in turns]


def fill(rng: random.Random, sizes: Sequence[int], needed: Sequence[bool], room: int, name: str) -> list[bool]:
    """Which parts to take: the needed ones, and at random such others as fit in ``room`` tokens.

    Raises:
        ValueError: all together are below 0.9 of ``room``.
    """
    if sum(sizes) < room * 0.9:
        raise Unsuitable(f"{name}: all texts together have {sum(sizes)} tokens: use a length of {sum(sizes)} or less")
    kept = list(needed)
    room -= sum(size for size, wanted in zip(sizes, needed, strict=True) if wanted)
    for place in rng.sample(range(len(sizes)), len(sizes)):
        if not kept[place] and sizes[place] <= room:
            kept[place] = True
            room -= sizes[place]
    return kept


def size_of(text: str, count: Count) -> int:
    """Tokens of a text and of the empty line before the next; tokenizers split that one otherwise where all ends."""
    return count(f"{text}\n\n.") - 1


def evidence(asked: Asked, scenario: str, ordered: Sequence[Session]) -> tuple[Span, ...]:
    """Where in the sessions, joined by empty lines, the source of the answer is; () if nowhere. Others' are blanked."""
    texts = (session.text if session.user == scenario else " " * len(session.text) for session in ordered)
    found = locate(asked.source, asked.answers, "\n\n".join(texts))
    return (found,) if found else ()


def locate(source: str, answers: Sequence[str], text: str) -> Span | None:
    """Where a text has what a source quotes, whatever the case and the kind of quotation marks and dashes.

    Sources hold quotation marks of their own, leave words out ("..."), and some join what is apart. So: the longest run
    of words of a part of the source, if it has :data:`LEAST_WORDS` or is the whole part; a run with an answer in it
    comes before others. If there is none, the first place of an answer as a whole word.
    """
    text, wanted = same(text), [same(answer) for answer in answers]
    runs = [run for part in re.split(r"\.\.\.|\u2026", source) if (run := longest_run(same(part), text))]
    if runs:
        best = max(runs, key=lambda run: (any(answer in run for answer in wanted), len(run)))
        return text.index(best), text.index(best) + len(best)
    for answer in wanted:
        if found := re.search(rf"\b{re.escape(answer)}\b", text):
            return found.span()
    return None


def longest_run(part: str, text: str) -> str:
    """The longest run of words of ``part`` that ``text`` has, see :func:`locate`; "" if there is none."""
    words = part.strip(" .,;:!?'\"").split()
    for size in range(len(words), min(LEAST_WORDS, len(words)) - 1, -1):
        for first in range(len(words) - size + 1):
            run = " ".join(words[first : first + size])
            if run and run in text:
                return run
    return ""


def same(text: str) -> str:
    """Small letters, straight quotation marks, and hyphens for dashes: as many characters as before."""
    return text.translate(SAME).lower()


NEW_TOKENS_OF_BANKING = 8
"""So many that a resident set is read, also on a GPU, where the first one takes two or three steps."""


def banking(folder: pathlib.Path, count: Count, length: int) -> Iterator[Sample]:
    """One sample a task of the bank's customers in ``inspect_evals``: pages of the handbook, and what a customer wants.

    For what selectors keep: the evidence is all documents that the task's authors marked as required, and there is no
    right answer, so that nothing is scored.

    Args:
        folder: of the package; see :func:`find`.
        length: tokens to fill with other documents, in between; tasks that require more are left out.

    Raises:
        ValueError: files are missing or not as published; or all tasks require more, or there are too few documents.
    """
    path, tasks_path = (folder / BANKING / name for name in ("documents.json.gz", "tasks.json"))
    documents = list(records(path, {"id": str, "title": str, "content": str}))
    texts = [f"# {document['title'].strip()}\n\n{document['content'].strip()}" for document in documents]
    sizes = [size_of(text, count) for text in texts]
    ids = [document["id"] for document in documents]
    made = 0
    for task in records(tasks_path, {"id": str, "user_scenario": dict, "required_documents": list}):
        name = f"{SUITE}-banking-{length}-{plain(task['id'])}"
        question = task["user_scenario"].get("instructions")
        if not isinstance(question, str):
            raise ValueError(f"{tasks_path}: {task['id']}: user_scenario has no text of instructions: {seen(question)}")
        missing = [required for required in task["required_documents"] if required not in ids]
        if missing or not task["required_documents"]:
            raise ValueError(f"{tasks_path}: {task['id']}: required_documents not in {path}: {seen(missing)}: add them")
        needed = [each in task["required_documents"] for each in ids]
        room = length - count(question) - 1 - OVERHEAD
        if sum(size for size, wanted in zip(sizes, needed, strict=True) if wanted) > room:
            continue
        rng = random.Random(f"{SUITE}-banking-{task['id']}")
        order = rng.sample(range(len(texts)), len(texts))
        kept = fill(rng, sizes, needed, room, name)
        context, spans = "", []
        for place in order:
            if kept[place]:
                context += "\n\n" if context else ""
                if needed[place]:
                    spans.append((len(context), len(context) + len(texts[place])))
                context += texts[place]
        made += 1
        yield Sample(
            name,
            SUITE,
            "banking",
            length,
            context,
            (Turn(question, (), NEW_TOKENS_OF_BANKING, "any", evidence=tuple(spans)),),
        )
    if not made:
        raise Unsuitable(f"{length} tokens are too few for any task of {tasks_path}: use a longer length")
