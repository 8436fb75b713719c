"""What every generator of texts makes from a seed stays what it was: shipped indexers and results depend on it.

Where one of these sums changes on purpose, indexers are to be trained and results to be measured again.
"""

from __future__ import annotations

import hashlib
import pathlib
import random
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_lsa.evaluation.questions import questions
from sglang_lsa.evaluation.suites import longgen, mrcr, nolima, ruler, scbench
from sglang_lsa.evaluation.task import Task
from sglang_lsa.texts.corpus import make_prompts
from sglang_lsa.texts.document import FACTS, Question, build_document, fact_pages
from sglang_lsa.texts.families import EVALUATION, FAMILIES
from sglang_lsa.texts.haystack import Haystack

WORDS = "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar"
TASKS = [task for suite in (ruler, scbench, mrcr, nolima, longgen) for task in suite.TASKS.values()]
HAYSTACK = Haystack()


class Quarters:
    """A tokenizer whose tokens are four characters long."""

    chat_template = "as it says"

    def __call__(self, text: str, **options: Any) -> Any:
        starts = range(0, len(text), 4)
        offsets = [(start, min(start + 4, len(text))) for start in starts]
        ids = [sum(map(ord, text[start:stop])) for start, stop in offsets]
        return Tokenized(input_ids=ids, offset_mapping=offsets)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(f"<{message['role']}>{message['content']}</>" for message in messages) + "<assistant>"


class Tokenized(SimpleNamespace):
    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def checksum(*made: Any) -> str:
    return hashlib.sha256(repr(made).encode()).hexdigest()[:16]


def count(text: str) -> int:
    return -(-len(text) // 4)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Forty documents; one in five or so is held out."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for number in range(40):
        lines = (" ".join(rng.choices(WORDS.split(), k=9)) + "." for _ in range(60))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("family", [*FAMILIES, *EVALUATION])
def test_prompts_to_record(family: str, texts: pathlib.Path) -> None:
    made = [list(make_prompts(Quarters(), split, (700, 3000), 2, [family], texts)) for split in ("train", "held-out")]
    seen = [
        (p.name, p.family, p.split, p.source, p.text, p.question, p.answer, p.evidence, t.ids, t.answer, t.evidence)
        for pairs in made
        for p, t in pairs
    ]
    assert len(seen) == 8
    assert checksum(seen) == PROMPTS[family]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.suite}-{task.name}")
def test_samples(task: Task) -> None:
    seen = []
    for length, number in ((3000, 0), (3000, 1), (8000, 0)):
        sample = task.sample(length, number, HAYSTACK, count)
        turns = [
            (t.question, t.references, t.new_tokens, t.metric, t.start, t.evidence, t.golden) for t in sample.turns
        ]
        seen.append((sample.name, sample.context, turns, sample.together, sample.depth, sample.averaged))
        seen.append([(question.turn, question.ids, question.evidence) for question in questions(sample, Quarters())])
    assert checksum(seen) == SAMPLES[f"{task.suite}-{task.name}"]


def test_running_text(texts: pathlib.Path) -> None:
    own = Haystack(texts)
    assert checksum(HAYSTACK.draw(random.Random(3), 20_000), own.sentences(random.Random(3), 20_000)) == RUNNING


def test_documents_of_the_demo() -> None:
    documents = [build_document(Quarters(), fact) for fact in FACTS]
    asked = [Question(document, "What is the number for {word}?") for document in documents]
    seen = [(q.document.text, q.document.tokens, q.messages, fact_pages(Quarters(), q)) for q in asked]
    assert checksum(seen) == DOCUMENTS


PROMPTS = {
    "text": "3d5f6498ba019ffd",
    "facts": "503c5804b1efb504",
    "filler": "002c749860561de9",
    "pairs": "c02e876bb260ed6d",
    "records": "36d79e3ea2524f7f",
    "copying": "626a95c6db0f866f",
    "values": "333a92895c62d466",
    "lines": "1a7616ce37db8214",
    "chains": "5c255d51ae94c85e",
    "needle": "435916b54d1a8027",
}
SAMPLES = {
    "ruler-niah_single_1": "c60b7ddbb7f7cf06",
    "ruler-niah_single_2": "26cbdcf2cf566c0d",
    "ruler-niah_single_3": "bf06d5ece5dee465",
    "ruler-niah_multikey_1": "cf01ac901b67f9f9",
    "ruler-niah_multikey_2": "1ac09fb1ce31e191",
    "ruler-niah_multikey_3": "43bcc34d5b4f4f79",
    "ruler-niah_multivalue": "b4ac7b0e00a7110e",
    "ruler-niah_multiquery": "40fcde7aa9c3abf5",
    "ruler-vt": "86014e0e3855fdf2",
    "ruler-cwe": "f684cf7eea97038c",
    "ruler-fwe": "2cafda59a6a94a06",
    "scbench-kv": "83c954302b9eb783",
    "scbench-kv_shared": "ed3da3ce572f476d",
    "scbench-prefix_suffix": "20bba64d7e8bea49",
    "scbench-prefix_suffix_shared": "610231d9f3452a6a",
    "scbench-vt": "4a3767b465702378",
    "scbench-vt_shared": "282f5c57b209db7c",
    "scbench-math_find": "28eda7247ec56fba",
    "scbench-math_find_shared": "4b8db6472c43aec5",
    "mrcr-1needle": "a22650bfacd3b189",
    "mrcr-2needle": "c4d529865101d19b",
    "mrcr-4needle": "26bd46d6fa72704b",
    "mrcr-8needle": "234431d7da8a05e7",
    "nolima-one_hop": "a59c458197e901d7",
    "nolima-two_hop": "ba8402fbdd626361",
    "longgen-listing": "480440624da056de",
    "longgen-passage": "803e24a7ed338951",
}
RUNNING = "9a70af85b861eb5c"
DOCUMENTS = "a315ef3a5075bbb8"
