"""RULER's two tasks that need a question set: qa_1 (SQuAD) and qa_2 (HotpotQA), from files in their own formats."""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_lsa.evaluation.suites.ruler import fork, shuffled
from sglang_lsa.evaluation.task import Made, Task, Turn
from sglang_lsa.texts.haystack import Haystack


@dataclass(frozen=True)
class Asked:
    """A question of a QA set.

    Attributes:
        answers: each of which is right.
        gold: documents that have the answer, and of each the passages that it is in.
        related: other documents, about the same things.
    """

    question: str
    answers: tuple[str, ...]
    gold: tuple[tuple[str, tuple[str, ...]], ...]
    related: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Documents:
    """A question about documents in random order: its own, related ones, and any others that have room.

    A set with too few documents makes no longer contexts than of all of them.
    """

    asked: Sequence[Asked]
    all: Sequence[str]

    def __call__(self, rng: random.Random, characters: int, haystack: Haystack) -> Made:
        one = rng.choice(self.asked)
        order, places = fork(rng), fork(rng)
        intro = "Documents to answer a question from:\n\n"
        head = len("Document 100\n\n\n")
        chosen = dict.fromkeys(document for document, _ in one.gold)
        size = len(intro) + sum(len(document) + head for document in chosen)
        for document in (*order.sample(one.related, len(one.related)), *order.sample(self.all, len(self.all))):
            room = characters - size - head
            if room < 100:
                break
            if document not in chosen:
                chosen[document[:room]] = None
                size += len(document[:room]) + head
        context, passages, spans = intro, dict(one.gold), list[tuple[int, int]]()
        for place, document in enumerate(shuffled(places, chosen), 1):
            context += f"Document {place}\n"
            for passage in passages.get(document, ()):
                begin = len(context) + document.index(passage)
                spans.append((begin, begin + len(passage)))
            context += f"{document}\n\n"
        question = f"Answer from the documents above, and with the answer alone: {one.question}"
        turn = Turn(question, one.answers, 32, metric="any", start="Answer:", evidence=tuple(spans))
        return Made(context.rstrip(), (turn,))


def text_of(value: Any) -> str:
    """Raises: TypeError: it is no text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value.strip()


def read_squad(whole: Any) -> Iterable[Asked]:
    for article in whole["data"]:
        paragraphs = [text_of(paragraph["context"]) for paragraph in article["paragraphs"]]
        for own, paragraph in zip(paragraphs, article["paragraphs"], strict=True):
            related = tuple(dict.fromkeys(other for other in paragraphs if other != own))
            for qa in paragraph["qas"]:
                answers = () if qa.get("is_impossible") else tuple(text_of(answer["text"]) for answer in qa["answers"])
                yield Asked(text_of(qa["question"]), tuple(dict.fromkeys(answers)), ((own, (own,)),), related)


def read_hotpotqa(whole: Any) -> Iterable[Asked]:
    for qa in whole:
        supporting = {(title, place) for title, place in qa["supporting_facts"]}
        titles = {title for title, _ in supporting}
        gold, related = list[tuple[str, tuple[str, ...]]](), list[str]()
        for title, sentences in qa["context"]:
            document = f"{text_of(title)}\n{' '.join(map(text_of, sentences))}"
            passages = (text_of(s) for place, s in enumerate(sentences) if (title, place) in supporting and s.strip())
            if title in titles:
                gold.append((document, tuple(passages)))
            else:
                related.append(document)
        yield Asked(text_of(qa["question"]), (text_of(qa["answer"]),), tuple(gold), tuple(dict.fromkeys(related)))


QA_SETS: dict[str, tuple[str, Callable[[Any], Iterable[Asked]]]] = {
    "qa_1": ("squad.json", read_squad),
    "qa_2": ("hotpotqa.json", read_hotpotqa),
}


def task_of(name: str, whole: Any, read: Callable[[Any], Iterable[Asked]], where: str) -> Task:
    """The task of that name from a whole set. Questions without an answer are left out.

    Args:
        where: it is from, for errors.

    Raises:
        ValueError: it is not in the format of its set.
    """
    try:
        everything = list(read(whole))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: is not in the format of its set ({type(error).__name__}: {error}): "
            "fetch the file again, or take it out of the folder"
        ) from error
    asked = [one for one in everything if all(one.answers) and one.answers and one.gold]
    if not asked:
        raise ValueError(f"{where}: has no question with an answer: give the set's training or development part")
    documents = dict.fromkeys(
        document for one in everything for document in (*(gold for gold, _ in one.gold), *one.related)
    )
    return Task("ruler", name, Documents(asked, list(documents)))


def qa_tasks(folder: pathlib.Path) -> dict[str, Task]:
    """``qa_1`` from the folder's ``squad.json`` and ``qa_2`` from its ``hotpotqa.json``, whichever is there.

    Each is in its set's own format. Questions without an answer are left out.

    Raises:
        ValueError: it has neither, or one that cannot be read.
    """
    tasks: dict[str, Task] = {}
    for name, (file, read) in QA_SETS.items():
        path = folder / file
        if not path.exists():
            continue
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--qa {path}: cannot be read ({type(error).__name__}: {error}): fetch the file again, or take it out "
                "of the folder"
            ) from error
        tasks[name] = task_of(name, whole, read, f"--qa {path}")
    if not tasks:
        raise ValueError(f"--qa {folder}: has neither squad.json nor hotpotqa.json: put one there, or leave --qa out")
    return tasks
