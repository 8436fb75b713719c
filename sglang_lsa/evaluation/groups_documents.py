"""Documents that many questions are asked about at the same time."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tqdm import tqdm

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.evaluation.questions import Question, questions
from sglang_lsa.evaluation.store import key
from sglang_lsa.evaluation.suites import together
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.texts.haystack import Haystack


@dataclass(frozen=True, eq=False)
class Document:
    """All questions about one document, and what they have in common.

    Attributes:
        number: of the documents of this kind and length.
    """

    number: int
    questions: tuple[Question, ...]

    def check(self, most: int, pages: int) -> None:
        """See whether a server can decode all questions at once, under full attention, too.

        Args:
            most: requests that it decodes at once.
            pages: that it has room for on the device.

        Raises:
            ValueError: it cannot; what to do.
        """
        if most < len(self.questions):
            raise ValueError(
                f"the server decodes {most} requests at once, fewer than --questions {len(self.questions)}: "
                "ask fewer, or give it more --max-running-requests in --server-args"
            )
        shared = len(self.common) // PAGE_SIZE
        each = (pages_spanned(len(q.ids) + q.asked.new_tokens, PAGE_SIZE) - shared for q in self.questions)
        if (needed := shared + sum(each)) > pages:
            raise ValueError(
                f"{self.questions[0].sample.name}: under full attention the questions need {needed * PAGE_SIZE} tokens "
                f"of device KV, and the server has {pages * PAGE_SIZE}: give it more --lsa-device-tokens in "
                "--server-args, or ask fewer"
            )

    @property
    def kind(self) -> str:
        return self.questions[0].sample.task

    @property
    def length(self) -> int:
        return self.questions[0].sample.length

    @cached_property
    def digest(self) -> str:
        """Of all that is asked."""
        return key([(question.ids, question.asked.new_tokens) for question in self.questions])

    @cached_property
    def common(self) -> tuple[int, ...]:
        """What all prompts begin with."""
        first, last = (choose(question.ids for question in self.questions) for choose in (min, max))
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        return tuple(token for token, _ in same)


def make_documents(
    tokenizer: Any,
    kinds: Sequence[str],
    lengths: Sequence[int],
    documents: int,
    asked: int,
    texts: pathlib.Path | None = None,
) -> list[Document]:
    """The first document of every kind and length, then the second, and so on.

    Raises:
        ValueError: they cannot be made as asked.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    tasks, haystack = [together.task(kind, asked) for kind in kinds], Haystack(texts)
    made = [(number, task, length) for number in range(documents) for length in lengths for task in tasks]
    return [
        Document(number, tuple(questions(task.sample(length, number, haystack, count), tokenizer)))
        for number, task, length in tqdm(made, desc="making documents", leave=False)
    ]
