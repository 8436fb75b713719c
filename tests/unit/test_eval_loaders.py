"""Published files as samples: every field of small files in their format, and errors on files that are not."""

from __future__ import annotations

import gzip
import json
import pathlib
import re
import sys

import pytest

from sglang_lsa.evaluation.command import Files
from sglang_lsa.evaluation.metrics import METRICS
from sglang_lsa.evaluation.suites import agentic, longbench_v2, longmemeval
from sglang_lsa.evaluation.task import Sample

DATA = pathlib.Path(__file__).parents[1] / "data"
SAID = {
    "customer": ["My name is Zeno.", "I bought  a kettle—it  leaks from the spout."],
    "finance": ["I run a fund.", "It holds bonds only."],
    "healthcare": ["I take two pills.", "“I was told to walk,” said the patient, every single morning."],
    "notetaker": ["Monday: Call the roofer. Buy nails.", "Tuesday: Rest."],
    "student": ["I study law.", "My cat is Plum. She sleeps a lot. In spring I row on the lake."],
}
ASKED = {
    "customer": ("What leaks?", ["kettle"], "...I bought a kettle - it leaks..."),
    "finance": ("What does the fund hold?", ["bonds"], "words that were never said by anybody"),
    "healthcare": (
        "When does the patient walk?",
        ["Morning"],
        '"I was told to walk," said the patient, every morning.',
    ),
    "notetaker": ("What to buy?", ["screws"], "nothing of the kind"),
    "student": ("Where do I row?", ["lake", "the lake"], "My cat is Plum. She sleeps a lot... I row on the lake..."),
}


def words(text: str) -> int:
    return len(text.split())


def write_lines(path: pathlib.Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def says(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def bfcl(tmp_path: pathlib.Path) -> pathlib.Path:
    data = tmp_path / "bfcl_eval" / "data"
    questions, answers = [], []
    for number, (scenario, (question, right, source)) in enumerate(ASKED.items()):
        sessions = [{"id": f"{scenario}-{said}", "question": [says(said), says("Thanks.")]} for said in SAID[scenario]]
        write_lines(data / "memory_prereq_conversation" / f"memory_{scenario}.json", sessions)
        name = f"memory_{number}-{scenario}-0"
        questions.append({"id": name, "question": [says(question)], "scenario": scenario})
        answers.append({"id": name, "ground_truth": right, "source": source})
    write_lines(data / "BFCL_v4_memory.json", questions)
    write_lines(data / "possible_answer" / "BFCL_v4_memory.json", answers)
    return data.parent


@pytest.fixture
def bank(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "inspect_evals" / agentic.BANKING
    folder.mkdir(parents=True)
    pages = [{"id": f"doc_{at}", "title": f"Rule {at}", "content": f"Fee of {at}. " * 6} for at in range(30)]
    (folder / "documents.json.gz").write_bytes(gzip.compress(json.dumps(pages).encode()))
    required = {"You want a card.": ["doc_3", "doc_20"], "You want all.": [f"doc_{number}" for number in range(12)]}
    tasks = [
        {"id": f"task_{number}", "user_scenario": {"instructions": wish}, "required_documents": documents}
        for number, (wish, documents) in enumerate(required.items())
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return tmp_path / "inspect_evals"


def evidence(sample: Sample, turn: int = 0) -> list[str]:
    return [sample.context[begin:end] for begin, end in sample.turns[turn].evidence]


def test_longbench_v2() -> None:
    first, second = longbench_v2.load(DATA / "longbench_v2.json", words)
    assert (first.name, first.suite, first.task) == ("longbench_v2-short-made-up-1", "longbench_v2", "short")
    assert first.context == "The lamp stood by the stairs.\nNobody moved it."
    (turn,) = first.turns
    assert (
        "Where did the lamp stand?\n(A) On the desk\n(B) In the hall\n(C) By the stairs\n(D) Nowhere" in turn.question
    )
    assert (turn.references, turn.metric, turn.evidence) == (("C",), "choice", ())
    assert METRICS[turn.metric]("C) By the stairs", turn.references) == 1
    assert METRICS[turn.metric]("A) On the desk", turn.references) == 0
    assert first.length == words(first.context) + words(turn.question) + words(turn.start)
    assert (first.together, first.depth) == (False, None)
    assert (second.name, second.task, second.turns[0].references) == ("longbench_v2-long-made-up-2", "long", ("A",))


def test_json_lines_read_like_a_list(tmp_path: pathlib.Path) -> None:
    records = json.loads((DATA / "longbench_v2.json").read_text())
    records[0]["context"] += "line\u2028separator"
    write_lines(tmp_path / "lines.jsonl", records)
    (tmp_path / "list.json").write_text(json.dumps(records))
    listed = list(longbench_v2.load(tmp_path / "list.json", words))
    assert list(longbench_v2.load(tmp_path / "lines.jsonl", words)) == listed


def test_longmemeval() -> None:
    first, second, third = longmemeval.load(DATA / "longmemeval.json", words)
    assert (first.name, first.task) == ("longmemeval-single-session-user-made_up_1", "single-session-user")
    assert first.suite == "longmemeval"
    assert first.context == (
        "[Chat of 2023/04/02 (Sun) 19:05]\nUser: I keep 7 hens. What do they eat?\nAssistant: Grain.\n\n"
        "[Chat of 2023/05/09 (Tue) 08:30]\nUser: Name a soup.\nAssistant: Borscht."
    )
    assert evidence(first) == ["User: I keep 7 hens. What do they eat?"]
    assert first.depth == first.context.index("User") / len(first.context)
    turn = first.turns[0]
    assert "How many hens do I keep?" in turn.question and "2023/06/01 (Thu) 10:00" in turn.question
    assert (turn.references, turn.metric) == (("7",), "any")
    assert first.length == words(first.context) + words(turn.question)
    assert second.turns[0].references == ("7 days", "8 days")
    assert (len(evidence(second)), second.depth) == (2, None)
    assert (third.name, third.task) == ("longmemeval-abstention-made_up_3_abs", "abstention")
    assert METRICS["any"]("You did not mention a goat.", third.turns[0].references) == 1
    assert METRICS["any"]("It is called Ada.", third.turns[0].references) == 0
    assert third.turns[0].evidence == ()


def test_bfcl_memory(bfcl: pathlib.Path) -> None:
    samples = {sample.name: sample for sample in agentic.bfcl_memory(bfcl, words)}
    assert list(samples) == [f"agentic-memory-{scenario}" for scenario in agentic.SCENARIOS]
    customer = samples["agentic-memory-customer"]
    assert customer.context == (
        "[Session 1 of User A]\nUser A: My name is Zeno.\nUser A: Thanks.\n\n"
        "[Session 2 of User A]\nUser A: I bought a kettle—it leaks from the spout.\nUser A: Thanks."
    )
    assert (customer.suite, customer.task, customer.together, customer.depth) == ("agentic", "memory", True, None)
    (turn,) = customer.turns
    assert "User A: What leaks?" in turn.question
    assert (turn.references, turn.metric) == (("kettle",), "words")
    prompt = words(customer.context) + words(turn.question)
    assert customer.length == prompt + turn.new_tokens + agentic.OVERHEAD


@pytest.mark.parametrize("length", [None, 200])
@pytest.mark.parametrize(
    ("scenario", "found"),
    [
        ("customer", ["I bought a kettle"]),
        ("finance", ["bonds"]),
        ("healthcare", ["I was told to walk,” said the patient, every"]),
        ("notetaker", []),
        ("student", ["I row on the lake"]),
    ],
)
def test_evidence_of_memories(bfcl: pathlib.Path, scenario: str, found: list[str], length: int | None) -> None:
    samples = [sample for sample in agentic.bfcl_memory(bfcl, words, length) if sample.name.endswith(scenario)]
    assert [evidence(sample) for sample in samples] == [found]


def test_memories_of_others_in_between(bfcl: pathlib.Path) -> None:
    samples = list(agentic.bfcl_memory(bfcl, words, 200))
    assert samples == list(agentic.bfcl_memory(bfcl, words, 200))
    assert len(samples) == 5
    for sample, user in zip(samples, "ABCDE", strict=True):
        turn = sample.turns[0]
        asked = words(sample.context) + words(turn.question) + turn.new_tokens + agentic.OVERHEAD
        assert sample.length == 200 and 170 <= asked <= 200, sample.name
        heads = re.findall(r"\[Session (\d) of User (.)\]", sample.context)
        assert [number for number, whose in heads if whose == user] == ["1", "2"]
        assert len({whose for _, whose in heads}) > 1
        for other in "ABCDE":
            numbers = [number for number, whose in heads if whose == other]
            assert numbers == sorted(numbers)


def test_memories_too_long_or_too_short(bfcl: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="50 tokens are too few"):
        list(agentic.bfcl_memory(bfcl, words, 50))
    with pytest.raises(ValueError, match=r"all texts together have \d+ tokens: use"):
        list(agentic.bfcl_memory(bfcl, words, 5000))


@pytest.mark.parametrize(("length", "tasks"), [(250, [0]), (400, [0, 1])])
def test_banking(bank: pathlib.Path, length: int, tasks: list[int]) -> None:
    samples = list(agentic.banking(bank, words, length))
    assert samples == list(agentic.banking(bank, words, length))
    assert [sample.name for sample in samples] == [f"agentic-banking-{length}-task_{number}" for number in tasks]
    sample = samples[0]
    (turn,) = sample.turns
    assert (sample.suite, sample.task, sample.length, sample.together) == ("agentic", "banking", length, False)
    assert (turn.question, turn.references, turn.new_tokens) == ("You want a card.", (), 8)
    assert METRICS[turn.metric]("anything", turn.references) == 0
    rule = "# Rule {0}\n\n" + " ".join(["Fee of {0}."] * 6)
    assert sorted(evidence(sample)) == [rule.format(20), rule.format(3)]
    assert length * 0.85 <= words(sample.context) + words(turn.question) + 1 + agentic.OVERHEAD <= length


def test_longer_banking_keeps_the_order(bank: pathlib.Path) -> None:
    short, long = (next(agentic.banking(bank, words, length)).context for length in (250, 400))
    shorter, longer = (re.findall(r"# Rule (\d+)", context) for context in (short, long))
    assert len(shorter) < len(longer)
    assert [rule for rule in longer if rule in shorter] == shorter


def test_banking_too_long_or_too_short(bank: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="80 tokens are too few for any task"):
        list(agentic.banking(bank, words, 80))
    with pytest.raises(ValueError, match=r"all texts together have 630 tokens: use"):
        list(agentic.banking(bank, words, 5000))


def test_banking_is_asked_at_every_length_that_has_room(bank: pathlib.Path) -> None:
    files = Files(tau2=bank)
    assert {sample.length for sample in files.samples(words, [80, 250, 400])} == {250, 400}


def test_find() -> None:
    folder = agentic.find("pytest")
    assert folder is not None and (folder / "__init__.py").is_file()
    assert agentic.find("bfcl_eval_of_nobody") is None
    before = set(sys.modules)
    assert agentic.find("lib2to3") or agentic.find("turtledemo") or agentic.find("ensurepip")
    assert not {"lib2to3", "turtledemo", "ensurepip"} & (set(sys.modules) - before)


LOADERS = {"longbench_v2.json": longbench_v2.load, "longmemeval.json": longmemeval.load}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: give the published file"),
        ("{not json", "cannot be read: .*: give the published file"),
        ('[{"a": 1}, ', "cannot be read"),
        ("[3]", "record 0 is 3, no object"),
        ('{"a": 1}', "record 0 has no '.*', only a: add it"),
    ],
)
def test_bad_files(tmp_path: pathlib.Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} cannot be read: .*No such file"):
        list(LOADERS[name](path, words))
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        list(LOADERS[name](path, words))


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("longbench_v2.json", "context", None, "record 0: context is None: make it str"),
        ("longbench_v2.json", "length", "huge", "length is 'huge': make it one of short, medium, long"),
        ("longbench_v2.json", "answer", "E", "answer is 'E': make it A, B, C or D"),
        ("longmemeval.json", "answer", [7], r"answer is \[7\]: make it str or int or float"),
        (
            "longmemeval.json",
            "question_type",
            "riddle",
            "question_type is 'riddle': make it one of single-session-user,",
        ),
        ("longmemeval.json", "haystack_dates", [], "0 haystack_dates for 2 haystack_sessions"),
        ("longmemeval.json", "haystack_sessions", [[], "x"], "a session is 'x': make it a list of turns"),
        ("longmemeval.json", "haystack_sessions", [[], [{"role": "user"}]], "a turn is .*: give it a role and content"),
    ],
)
def test_bad_values(tmp_path: pathlib.Path, name: str, key: str, value: object, message: str) -> None:
    records = json.loads((DATA / name).read_text())
    records[0][key] = value
    (tmp_path / name).write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message):
        list(LOADERS[name](tmp_path / name, words))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("BFCL_v4_memory.json", {"scenario": "pirate"}, "scenario is 'pirate': make it one of customer,"),
        ("BFCL_v4_memory.json", {"id": "memory_9"}, "possible_answer.*no answer to memory_9"),
        ("BFCL_v4_memory.json", {"scenario": "student"}, "no questions of customer"),
        ("BFCL_v4_memory.json", {"question": ["Hm?"]}, r"question is \['Hm\?'\]: make it lists of messages"),
        ("possible_answer/BFCL_v4_memory.json", {"source": 3}, "record 0: source is 3: make it str"),
        ("memory_prereq_conversation/memory_finance.json", {"question": [[{}]]}, "make it lists of messages"),
    ],
)
def test_bad_memories(bfcl: pathlib.Path, file: str, change: dict, message: str) -> None:
    path = bfcl / "data" / file
    records = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [records[0] | change, *records[1:]])
    with pytest.raises(ValueError, match=message):
        list(agentic.bfcl_memory(bfcl, words))
    path.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} cannot be read"):
        list(agentic.bfcl_memory(bfcl, words))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"required_documents": ["doc_99"]}, r"required_documents not in .*: \['doc_99'\]: add them"),
        ({"required_documents": []}, "required_documents"),
        ({"user_scenario": {}}, "has no text of instructions: None"),
        ({"user_scenario": "hm"}, "user_scenario is 'hm': make it dict"),
    ],
)
def test_bad_tasks(bank: pathlib.Path, change: dict, message: str) -> None:
    path = bank / agentic.BANKING / "tasks.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([records[0] | change]))
    with pytest.raises(ValueError, match=message):
        list(agentic.banking(bank, words, 250))
    (bank / agentic.BANKING / "documents.json.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ValueError, match=r"documents\.json\.gz cannot be read"):
        list(agentic.banking(bank, words, 250))
