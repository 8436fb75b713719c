"""RULER's tasks: of the length asked for, the same every time, with answers and evidence where they are said to be."""

from __future__ import annotations

import json
import pathlib
import random
import re
from collections import Counter

import pytest

from sglang_lsa.evaluation.metrics import METRICS
from sglang_lsa.evaluation.suites import ruler
from sglang_lsa.evaluation.suites.ruler import ADJECTIVES, DEPTHS, NOUNS, TASKS
from sglang_lsa.evaluation.suites.ruler_qa import qa_tasks
from sglang_lsa.evaluation.task import Count, Made, Sample, Task
from sglang_lsa.texts import words as recorded
from sglang_lsa.texts.haystack import Haystack

LENGTHS = (2048, 6000)
COUNTS: dict[str, Count] = {
    "characters": lambda text: len(text) // 4,
    "words": lambda text: len(re.findall(r"\w{1,6}|[^\w\s]", text)),
}
NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}
KEYS_VALUES_ASKED = {
    "niah_single_1": (1, 1, 1),
    "niah_single_2": (1, 1, 1),
    "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 1, 1),
    "niah_multivalue": (1, 4, 1),
    "niah_multiquery": (4, 1, 4),
}
PLACED = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1")
NEEDLE = re.compile(r"A magic (?:number|uuid) for (\S+) is: (\S+)\.")
SET = re.compile(r"SET ([A-Z]{5}) = (\w+)")


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack()


@pytest.fixture(scope="module")
def samples(haystack: Haystack) -> dict[tuple[str, str, int, int], Sample]:
    """By task, count, length and number."""
    return {
        (name, by, length, number): task.sample(length, number, haystack, count)
        for name, task in TASKS.items()
        for by, count in COUNTS.items()
        for length in LENGTHS
        for number in (0, 1)
    }


def spans(made: Sample | Made) -> list[str]:
    (turn,) = made.turns
    return [made.context[begin:end] for begin, end in turn.evidence]


def judge(sample: Sample, answer: str) -> float:
    (turn,) = sample.turns
    return METRICS[turn.metric](answer, turn.references)


def test_the_tasks_that_need_no_files() -> None:
    wanted = {"vt", "cwe", "fwe", "niah_multikey_2", "niah_multikey_3"} | set(KEYS_VALUES_ASKED)
    assert set(TASKS) == wanted and len(TASKS) == 11
    assert all(task.suite == "ruler" and task.name == name and task.averaged for name, task in TASKS.items())


def test_lengths(samples: dict[tuple[str, str, int, int], Sample]) -> None:
    for (task, by, length, _), sample in samples.items():
        (turn,) = sample.turns
        tokens = COUNTS[by](sample.context) + COUNTS[by](turn.question + turn.start) + turn.new_tokens + 64
        assert length * 0.9 <= tokens <= length, sample.name
        assert turn.new_tokens == NEW_TOKENS.get(task, 128) and turn.metric == "all"
        assert sample.context == sample.context.strip()  # chat templates may strip it, and evidence would move


def test_least_and_long(haystack: Haystack) -> None:
    for task in TASKS.values():
        for length in (task.least, 40_000):
            for count in COUNTS.values():
                assert task.sample(length, 3, haystack, count).length == length


def test_the_same_every_time(haystack: Haystack, samples: dict[tuple[str, str, int, int], Sample]) -> None:
    for name, task in TASKS.items():
        first, other = (samples[name, "characters", 2048, number] for number in (0, 1))
        assert task.sample(2048, 0, haystack, COUNTS["characters"]) == first
        assert first.context != other.context and first.turns[0].references != other.turns[0].references


def test_answers(samples: dict[tuple[str, str, int, int], Sample]) -> None:
    for sample in samples.values():
        references = sample.turns[0].references
        assert judge(sample, ", ".join(references)) == 1.0 and judge(sample, "") == 0.0
        assert len(set(references)) == len(references)
        assert judge(sample, references[0]) == pytest.approx(1 / len(references))
        assert not any(reference.lower() in sample.turns[0].start.lower() for reference in references)


@pytest.mark.parametrize("name", TASKS)
def test_a_longer_sample_is_the_same_one_with_more_around_it(name: str, haystack: Haystack) -> None:
    short, long = (TASKS[name].make(random.Random(7), characters, haystack) for characters in (9_000, 50_000))
    assert len(long.context) > 4 * len(short.context)
    (one,), (two,) = short.turns, long.turns
    assert (one.question, one.references, one.start) == (two.question, two.references, two.start)
    assert spans(short) == spans(long) and short.depth == long.depth
    for made, characters in ((short, 9_000), (long, 50_000)):
        assert len(made.context) == pytest.approx(characters, rel=0.05)


@pytest.mark.parametrize("name", KEYS_VALUES_ASKED)
def test_needles(name: str, samples: dict[tuple[str, str, int, int], Sample]) -> None:
    keys, values, asked = KEYS_VALUES_ASKED[name]
    for sample in (sample for key, sample in samples.items() if key[0] == name):
        found = NEEDLE.findall(sample.context)
        assert len({key for key, _ in found}) == keys and len(found) == keys * values
        assert len(sample.turns[0].references) == asked * values
        for key in {key for key, _ in found}:
            assert (key in sample.turns[0].question) == any(key in span for span in spans(sample))
        shape = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if name == "niah_single_3" else r"[1-9]\d{6}"
        assert all(re.fullmatch(shape, value) for _, value in found)
        assert (ruler.NOISE in sample.context) == (name == "niah_single_1")


def test_evidence_of_needles(samples: dict[tuple[str, str, int, int], Sample]) -> None:
    for (task, _, _, _), sample in samples.items():
        references = sample.turns[0].references
        if not task.startswith("niah"):
            continue
        assert len(spans(sample)) == len(references)
        for span, reference in zip(spans(sample), references, strict=True):
            (found,) = NEEDLE.finditer(span)
            assert found.group() == span and found.group(2) == reference and found.group(1) in sample.turns[0].question
            assert sample.context.count(reference) == 1


@pytest.mark.parametrize("name", ("niah_multikey_2", "niah_multikey_3"))
def test_needles_among_needles(name: str, samples: dict[tuple[str, str, int, int], Sample]) -> None:
    for (task, _, length, _), sample in samples.items():
        if task == name:
            _, lines = sample.context.split("\n\n")
            found = [NEEDLE.fullmatch(line) for line in lines.split("\n")]
            assert all(found) and len(found) > length / 50
            (key,) = NEEDLE.findall(spans(sample)[0])[0][:1]
            assert sum(line.group(1) == key for line in found if line) == 1


@pytest.mark.parametrize("name", PLACED)
def test_depths(name: str, haystack: Haystack) -> None:
    depths = set()
    for number in range(60):
        made = TASKS[name].make(random.Random(number), 20_000, haystack)
        assert made.depth is not None and 0 <= made.depth <= 1
        ((begin, _),) = made.turns[0].evidence
        parts = ruler.NOISE if name == "niah_single_1" else r"[.!?]\s" if name in ESSAYS else r"\n"
        before, whole = (len(re.findall(parts, text)) for text in (made.context[:begin], made.context))
        assert before / whole == pytest.approx(made.depth, abs=0.03)
        depths.add(made.depth)
    assert len(depths) > 20 and min(depths) < 0.15 and max(depths) > 0.85
    if name in ESSAYS or name == "niah_single_1":
        assert depths <= set(DEPTHS)
    assert len(DEPTHS) == 40 and DEPTHS[0] == 0 and DEPTHS[-1] == 1


def test_only_single_places_have_a_depth(samples: dict[tuple[str, str, int, int], Sample]) -> None:
    assert {key[0] for key, sample in samples.items() if sample.depth is not None} == set(PLACED)


def test_variables(samples: dict[tuple[str, str, int, int], Sample]) -> None:
    for (task, _, _, _), sample in samples.items():
        if task != "vt":
            continue
        turn = sample.turns[0]
        found = SET.findall(sample.context)
        assert [name for name, _ in found] == list(turn.references) and len(found) == 5
        sources = [source for _, source in found]
        assert sources[1:] == list(turn.references)[:-1] and sources[0] in turn.question and sources[0] in turn.start
        assert re.fullmatch(r"\d{5}", sources[0]) and sample.context.count(sources[0]) == 1
        assert [SET.fullmatch(span) is not None for span in spans(sample)] == [True] * 5


@pytest.mark.parametrize(("characters", "often", "seldom", "shown"), ((7_000, 6, 1, 3), (30_000, 30, 3, 10)))
def test_common_words(characters: int, often: int, seldom: int, shown: int, haystack: Haystack) -> None:
    made = TASKS["cwe"].make(random.Random(1), characters, haystack)
    example, text = made.context.split("\n\nList: ")
    entries = re.findall(r"(\d+)\. ([a-z]{6})", text)
    assert [int(place) for place, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert {word for word, count in counts.items() if count == often} == set(made.turns[0].references)
    assert len(made.turns[0].references) == 10 and set(counts.values()) == {often, seldom}
    worked = Counter(re.findall(r"\d+\. ([a-z]{6})", example))
    assert set(example.rsplit(": ", 1)[1].split(", ")) == {word for word, count in worked.items() if count == shown}
    assert not worked.keys() & counts.keys() and made.turns[0].evidence == ()


def test_there_are_words_enough_to_count(haystack: Haystack) -> None:
    made = TASKS["cwe"].make(random.Random(1), 1_000_000, haystack)
    assert len(set(re.findall(r"\d+\. ([a-z]{6})", made.context))) > 20_000


def test_frequent_words(samples: dict[tuple[str, str, int, int], Sample]) -> None:
    for (task, _, _, _), sample in samples.items():
        if task != "fwe":
            continue
        everything = sample.context.split("\n\n")[1].split(" ")
        (dots, most), *ranked = Counter(everything).most_common(5)
        assert dots == "..." and all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked)
        assert tuple(word for word, _ in ranked[:3]) == sample.turns[0].references
        for rank, (_, count) in enumerate(ranked, 2):
            assert count == pytest.approx(most / rank**2, abs=1.01)
        assert ranked[2][1] > ranked[3][1] and sample.turns[0].evidence == ()


def test_words_are_of_no_training_prompt() -> None:
    own = ADJECTIVES.split() + NOUNS.split()
    assert len(set(ADJECTIVES.split())) >= 60 and len(set(NOUNS.split())) >= 120 and len(own) == len(set(own))
    for split in recorded.NOUNS:
        assert not set(own) & set(recorded.NOUNS[split].split() + recorded.ADJECTIVES[split].split())
    assert not set(re.split(r"(?<=\.) ?", ruler.NOISE)) & set(re.split(r"(?<=\.) ?", recorded.FILLER)) - {""}


def squad() -> dict[str, object]:
    def paragraph(article: int, number: int) -> dict[str, object]:
        town = f"Town{article}x{number}"
        return {
            "context": f"{town} has a port. "
            + f"Its mayor is called Mayor{article}x{number}. "
            + "It rains there. " * 20,
            "qas": [
                {
                    "question": f"Who is the mayor of {town}?",
                    "answers": [{"text": f"Mayor{article}x{number}"}] * 2,
                    "is_impossible": False,
                },
                {"question": "Who is its king?", "answers": [], "is_impossible": True},
            ],
        }

    articles = [{"title": f"A{a}", "paragraphs": [paragraph(a, n) for n in range(5)]} for a in range(20)]
    return {"version": "1", "data": articles}


def hotpotqa() -> list[dict[str, object]]:
    def document(question: int, number: int) -> list[object]:
        name = f"River{question}x{number}"
        return [name, [f"{name} is long.", f" It ends in Sea{question}x{number}.", " Boats go there." * 20]]

    return [
        {
            "_id": str(question),
            "question": f"Where does River{question}x3 end?",
            "answer": f"Sea{question}x3",
            "context": [document(question, number) for number in range(10)],
            "supporting_facts": [[f"River{question}x3", 1], [f"River{question}x7", 0], [f"River{question}x7", 90]],
        }
        for question in range(10)
    ]


@pytest.fixture(scope="module")
def qa(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("qa")
    (folder / "squad.json").write_text(json.dumps(squad()))
    (folder / "hotpotqa.json").write_text(json.dumps(hotpotqa()))
    return qa_tasks(folder)


@pytest.mark.parametrize("name", ("qa_1", "qa_2"))
def test_questions_about_documents(name: str, qa: dict[str, Task], haystack: Haystack) -> None:
    assert set(qa) == {"qa_1", "qa_2"}
    asked = set()
    for number in range(6):
        for length in LENGTHS:
            for count in COUNTS.values():
                sample = qa[name].sample(length, number, haystack, count)
                assert sample == qa[name].sample(length, number, haystack, count)
                (turn,) = sample.turns
                assert (turn.metric, turn.new_tokens, len(turn.references)) == ("any", 32, 1)
                assert judge(sample, f"It is {turn.references[0]}.") == 1.0 and judge(sample, "") == 0.0
                assert turn.references[0] in spans(sample)[0] or turn.references[0] in spans(sample)[-1]
                numbers = [int(found) for found in re.findall(r"^Document (\d+)$", sample.context, re.M)]
                assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 5
                asked.add(turn.question)
    assert len(asked) > 3


def test_passages_that_have_the_answer(qa: dict[str, Task], haystack: Haystack) -> None:
    made = qa["qa_1"].make(random.Random(0), 6_000, haystack)
    (paragraph,) = spans(made)
    assert paragraph.startswith("Town") and paragraph.endswith("It rains there.")
    assert f"mayor of {paragraph.split()[0]}?" in made.turns[0].question
    made = qa["qa_2"].make(random.Random(0), 6_000, haystack)
    assert {span.split("x")[0].rstrip("0123456789") for span in spans(made)} == {"It ends in Sea", "River"}
    assert len(spans(made)) == 2 and all(span.count(".") == 1 for span in spans(made))


@pytest.mark.parametrize("name", ("qa_1", "qa_2"))
def test_more_documents_keep_the_question(name: str, qa: dict[str, Task], haystack: Haystack) -> None:
    short, long = (qa[name].make(random.Random(5), characters, haystack) for characters in (6_000, 25_000))
    assert short.turns[0].question == long.turns[0].question and sorted(spans(short)) == sorted(spans(long))
    assert [len(made.context) for made in (short, long)] == pytest.approx([6_000, 25_000], rel=0.05)


def test_too_few_documents(qa: dict[str, Task], haystack: Haystack) -> None:
    with pytest.raises(ValueError, match=r"ruler-qa_1-60000-0 cannot be made 60000 tokens long"):
        qa["qa_1"].sample(60_000, 0, haystack, COUNTS["characters"])


def test_whichever_set_is_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"has neither squad\.json nor hotpotqa\.json: put one there"):
        qa_tasks(tmp_path)
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpotqa()))
    assert set(qa_tasks(tmp_path)) == {"qa_2"}


DAMAGED: dict[str, tuple[str, str | bytes, str]] = {
    "cut": ("squad.json", json.dumps(squad())[:500], "JSONDecodeError"),
    "another set": ("squad.json", json.dumps(hotpotqa()), "TypeError"),
    "no answers": (
        "squad.json",
        '{"data": [{"paragraphs": [{"context": "A", "qas": [{"question": "B"}]}]}]}',
        "answers",
    ),
    "no text": ("squad.json", '{"data": [{"paragraphs": [{"context": 5, "qas": []}]}]}', "5 is no text"),
    "not a list": ("hotpotqa.json", json.dumps({"data": 1}), "TypeError"),
    "no context": ("hotpotqa.json", '[{"question": "A", "answer": "B", "supporting_facts": []}]', "context"),
    "bytes": ("hotpotqa.json", b"\xff\xfe\x00", "UnicodeDecodeError"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case: str, tmp_path: pathlib.Path) -> None:
    file, text, seen = DAMAGED[case]
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="fetch the file again, or take it out of the folder") as error:
        qa_tasks(tmp_path)
    assert f"--qa {tmp_path / file}: " in str(error.value) and seen in str(error.value)


def test_a_set_without_answers(tmp_path: pathlib.Path) -> None:
    (tmp_path / "squad.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match=r"squad\.json: has no question with an answer"):
        qa_tasks(tmp_path)
