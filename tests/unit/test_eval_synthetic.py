"""Samples of the suites that are made here: they fit, are the same every time, and their answers are where they say."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from sglang_lsa.evaluation.metrics import METRICS
from sglang_lsa.evaluation.suites import longgen, mrcr, nolima, scbench
from sglang_lsa.evaluation.task import A_TURN, Made, Sample, Task, Turn
from sglang_lsa.texts.haystack import Haystack

TASKS = [*scbench.TASKS.values(), *mrcr.TASKS.values(), *nolima.TASKS.values(), *longgen.TASKS.values()]
LENGTHS = (3000, 8000)
STOP_WORDS = set(
    re.findall(
        r"\w+",
        "a an and answer at by even each every for from has have in into is it name no not of on only or person since "
        "text the then there to was which who with above",
    )
)
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.suite}-{task.name}")


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack()


def count(text: str) -> int:
    """Tokens, as of a tokenizer with 4 characters each."""
    return len(text) // 4


def spans(turn: Turn, context: str) -> list[str]:
    return [context[first:stop] for first, stop in turn.evidence]


def golden(turn: Turn) -> str:
    return turn.golden or " ".join(turn.references)


def score(turn: Turn, answer: str) -> float:
    return METRICS[turn.metric](answer, turn.references)


def make(task: Task, characters: int, haystack: Haystack, seed: int = 0) -> Made:
    return task.make(random.Random(seed), characters, haystack)


def needed(sample: Sample, turn: Turn) -> list[str]:
    """What must be in the evidence, span by span."""
    if sample.suite == "mrcr" or sample.task == "passage":
        return [turn.references[0]]
    if sample.task.startswith("vt"):
        return [f"Let {name} be equal to" for name in turn.references]
    if sample.suite == "longgen":
        return [f"weighs {weight} grams." for weight in turn.references]
    return list(turn.references)


@every_task
@pytest.mark.parametrize("length", LENGTHS)
def test_samples(task: Task, length: int, haystack: Haystack) -> None:
    samples = [task.sample(length, number, haystack, count) for number in range(3)]
    assert samples[0] == task.sample(length, 0, haystack, count)
    assert len({sample.context for sample in samples}) == len({sample.turns for sample in samples}) == 3
    for sample in samples:
        asked = count(sample.context) + count("".join(turn.question + turn.start for turn in sample.turns))
        asked += 64 + A_TURN * (len(sample.turns) - 1)
        assert length * 0.9 <= asked + sum(turn.new_tokens for turn in sample.turns) <= length
        assert sample.context == sample.context.strip(), "chat templates cut space away, and spans would be elsewhere"
        assert sample.depth is None or 0 <= sample.depth <= 1
        for turn in sample.turns:
            for part, found in zip(needed(sample, turn), spans(turn, sample.context), strict=True):
                assert part in found
            assert score(turn, f" {golden(turn)}") == score(turn, golden(turn)) == 1.0
            assert score(turn, "") == 0.0
            assert turn.new_tokens >= count(golden(turn))


@every_task
def test_a_longer_sample_asks_the_same(task: Task, haystack: Haystack) -> None:
    short, long = make(task, 12_000, haystack), make(task, 40_000, haystack)
    assert len(long.context) > 2.5 * len(short.context)
    for before, after in zip(short.turns, long.turns, strict=True):
        assert (before.question, before.references, before.golden) == (after.question, after.references, after.golden)
        assert spans(before, short.context) == spans(after, long.context)
    order = [sorted(range(len(made.turns)), key=lambda n: made.turns[n].evidence) for made in (short, long)]
    assert order[0] == order[1]


@every_task
def test_characters_are_those_asked_for(task: Task, haystack: Haystack) -> None:
    assert len(make(task, 30_000, haystack).context) == pytest.approx(30_000, rel=0.05)


@pytest.mark.parametrize("name", scbench.MAKES)
def test_requests_and_conversations_are_the_same(name: str, haystack: Haystack) -> None:
    conversation, requests = scbench.TASKS[name], scbench.TASKS[f"{name}_shared"]
    ours, theirs = make(conversation, 9000, haystack, seed=5), make(requests, 9000, haystack, seed=5)
    assert (ours.context, ours.turns, ours.depth) == (theirs.context, theirs.turns, theirs.depth)
    assert (ours.together, theirs.together) == (False, True)
    assert len(ours.turns) == scbench.TURNS == len({turn.question for turn in ours.turns})


@pytest.mark.parametrize("name", ["kv", "prefix_suffix", "math_find"])
def test_turns_are_at_spread_depths(name: str, haystack: Haystack) -> None:
    made = make(scbench.TASKS[name], 20_000, haystack)
    depths = sorted(turn.evidence[0][0] / len(made.context) for turn in made.turns)
    for part, depth in enumerate(depths):
        assert part / scbench.TURNS - 0.02 <= depth <= (part + 1) / scbench.TURNS + 0.02
    assert [turn.evidence for turn in made.turns] != sorted(turn.evidence for turn in made.turns)


def test_keys_are_there_once(haystack: Haystack) -> None:
    made = make(scbench.TASKS["kv"], 20_000, haystack)
    pairs = re.findall(r'"([0-9a-f]{8})": "([0-9a-f]{8})"', made.context)
    for turn in made.turns:
        (key,) = re.findall(r'"([0-9a-f]{8})"', turn.question)
        assert [value for other, value in pairs if other == key] == list(turn.references)


def test_one_line_begins_and_ends_so(haystack: Haystack) -> None:
    made = make(scbench.TASKS["prefix_suffix"], 20_000, haystack)
    lines = made.context.split("\n")
    assert {len(line) for line in lines} == {16}
    for turn in made.turns:
        begin, end = re.findall(r'"(\w+)"', turn.question)
        assert [line for line in lines if line.startswith(begin) and line.endswith(end)] == list(turn.references)
        assert sum(line.startswith(begin) for line in lines) == 3 <= sum(line.endswith(end) for line in lines)


def test_variables_lead_to_the_number(haystack: Haystack) -> None:
    made = make(scbench.TASKS["vt"], 20_000, haystack)
    equal: dict[str, str] = {}
    for name, source in re.findall(r"Let ([A-Z]{5}) be equal to (\w+)\.", made.context):
        equal[name] = equal.get(source, source)
    assert len(equal) == scbench.TURNS * scbench.CHAIN
    for turn in made.turns:
        (number,) = re.findall(r"\d{5}", turn.question)
        assert {name for name, value in equal.items() if value == number} == set(turn.references)


def test_numbers_have_the_rank(haystack: Haystack) -> None:
    made = make(scbench.TASKS["math_find"], 200_000, haystack)
    numbers = [int(number) for number in made.context.split(", ")]
    ranked = sorted(numbers)
    ranks = {"largest": -1, "second largest": -2, "third largest": -3, "smallest": 0, "second smallest": 1}
    for turn in made.turns:
        rank = next(rank for rank in scbench.RANKS if f"the {rank} number" in turn.question)
        assert turn.references == (str(ranked[ranks[rank]]),)
        assert numbers.count(int(turn.references[0])) == 1


@pytest.mark.parametrize("needles", mrcr.NEEDLES)
@pytest.mark.parametrize("seed", range(5))
def test_one_of_several_answers(needles: int, seed: int, haystack: Haystack) -> None:
    made = make(mrcr.TASKS[f"{needles}needle"], 30_000, haystack, seed)
    (turn,) = made.turns
    asked = re.findall(r"^Repeat, word for word, the (\w.* about \w+) of the", turn.question)[0]
    assert f"the {asked}:" in turn.start
    ordinal, _, rest = asked.partition(" ")
    asked = asked if needles == 1 else rest
    said = made.context.removeprefix(mrcr.BEFORE).split("\n\n")
    answers = [part.split("\nAssistant: ")[1] for part in said if part.startswith(f"User: Write a {asked}.\n")]
    assert len(answers) == len(set(answers)) == needles
    number = 0 if needles == 1 else mrcr.ORDINALS.index(ordinal)
    others = [text for place, text in enumerate(answers) if place != number]
    others = others or list(turn.references[1:])
    assert turn.references == (answers[number], *others) and len(others) >= 1
    assert spans(turn, made.context) == [answers[number]]
    assert made.depth == turn.evidence[0][0] / len(made.context)
    assert {score(turn, other) for other in others} == {0}
    assert 0.5 < score(turn, " ".join(answers[number].split()[:-20])) < 1
    assert score(turn, f"\n\n{answers[number]}\n") == 1


def test_texts_are_long_and_resemble_each_other() -> None:
    texts = [mrcr.write(random.Random(seed), form, "owls") for seed in range(50) for form in mrcr.FORMS]
    assert all(120 <= len(text.split()) <= 160 for text in texts)
    assert len(set(texts)) == len(texts)
    assert not any("\n" in text or "{" in text for text in texts)
    triples = [{tuple(text.split()[n : n + 3]) for n in range(len(text.split()) - 2)} for text in texts[::10]]
    assert all(len(one & other) >= 5 for one, other in itertools.pairwise(triples))


def words(text: str) -> set[str]:
    """Words that mean something, without their endings."""
    return {word[:5] for word in re.findall(r"[a-z]+", text.lower()) if word not in STOP_WORDS and len(word) > 1}


def test_questions_share_no_word_with_their_needles() -> None:
    facts = [(needle, nolima.IS.format(what=what)) for needle, what in nolima.HABITS]
    for landmark, city, country in nolima.LANDMARKS:
        for needle in nolima.SIGHTS:
            facts += [
                (needle.replace("{landmark}", landmark), nolima.LIVES.format(place=place)) for place in (city, country)
            ]
    for needle, question in facts:
        assert words(needle.replace("{name}", "")) and words(question)
        assert not words(needle.replace("{name}", "")) & words(question)
    assert len(nolima.LANDMARKS) >= 20 and len(nolima.HABITS) >= 10
    assert len({city for _, city, _ in nolima.LANDMARKS}) == len({land for _, _, land in nolima.LANDMARKS}) == 28


@pytest.mark.parametrize("name", nolima.TASKS)
def test_needles_are_sentences_of_their_own(name: str, haystack: Haystack) -> None:
    depths = set()
    for seed in range(60):
        made = make(nolima.TASKS[name], 6000, haystack, seed)
        (turn,) = made.turns
        (needle,) = spans(turn, made.context)
        assert made.context.count(needle) == made.context.count(turn.references[0]) == 1
        assert not words(needle) & words(turn.question)
        before, after = made.context.split(needle)
        assert before == "" or re.search(r"([.!?]['\")]*\s|\n)$", before)
        assert after == "" or after.startswith(" ")
        assert made.depth is not None
        assert turn.evidence[0][0] / len(made.context) == pytest.approx(made.depth, abs=0.12)
        depths.add(round(made.depth * (nolima.DEPTHS - 1)))
    assert depths <= set(range(nolima.DEPTHS)) and len(depths) > 15


def test_no_name_is_in_the_speeches(haystack: Haystack) -> None:
    assert not [name for name in nolima.NAMES if any(name in document for document in haystack.documents)]


def test_entries_are_in_order(haystack: Haystack) -> None:
    made = make(longgen.TASKS["listing"], 20_000, haystack)
    (turn,) = made.turns
    entries = re.findall(r"Entry (\d+): the [^.]* weighs (\d+) grams\.", made.context)
    assert [int(number) for number, _ in entries] == list(range(1, longgen.ENTRIES + 1))
    first, last = (int(number) for number in re.findall(r"\d+", turn.question))
    assert last - first + 1 == longgen.ASKED == len(turn.references)
    assert [weight for number, weight in entries if first <= int(number) <= last] == list(turn.references)
    assert turn.golden.split("\n") == spans(turn, made.context)
    assert score(turn, "\n".join(turn.golden.split("\n")[: longgen.ASKED // 2])) == 0.5
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(turn.evidence)]
    assert sum(gap > 50 for gap in gaps) > 10


def test_a_passage_has_nine_windows(haystack: Haystack) -> None:
    """And it is one: half of it scores about half, another passage nothing."""
    sample = longgen.TASKS["passage"].sample(4096, 0, haystack, count)
    (turn,) = sample.turns
    letter = f"{turn.start} {turn.references[0]}"
    assert spans(turn, sample.context) == [letter] and sample.context.count(letter) == 1
    assert 9 * 64 <= count(letter) < turn.new_tokens
    half = turn.references[0][: len(turn.references[0]) // 2]
    assert 0.3 < score(turn, half) < 0.75
    assert score(turn, turn.references[1]) == 0


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_weave(depth: float) -> None:
    text = "One is here. Two is there! Is three?\nFour."
    context, places = scbench.weave(
        text, [(depth, "Second."), (depth, "Third."), (0.0, "First.")], " ", scbench.SENTENCE, ">"
    )
    assert [context[first:stop] for first, stop in places] == ["Second.", "Third.", "First."]
    assert places[2][0] == (1 if depth else 16)
    rest = context[1:]
    for piece in ("First.", "Second.", "Third."):
        rest = rest.replace(f"{piece} ", "").replace(f" {piece}", "")
    assert rest == text
