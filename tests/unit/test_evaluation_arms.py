"""Questions, arms and metrics of ``sglang-lsa eval``, without a server."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from made_samples import sample

from sglang_lsa.config import LSAConfig, RequestOptions
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.evaluation.arms import ARMS, Arm, asked_of, parse_arms
from sglang_lsa.evaluation.metrics import choice, copied, first_number, match_all, match_any, words
from sglang_lsa.evaluation.questions import Question, golden, questions
from sglang_lsa.evaluation.task import Sample, Turn


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_path())


# --- questions and arms ----------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_with_right_answers(tokenizer: Any) -> None:
    first, second = questions(sample(), tokenizer)
    text = tokenizer.decode(second.ids)
    assert text.count("Line 399 says") == 1 and "It says 700" in text
    assert text.index("What does line 100 say?") < text.index("It says 700") < text.index("What does line 300 say?")
    assert text.endswith("It says") and tokenizer.decode(first.ids).endswith("It says")
    assert golden(first.asked) == "It says 700"


def test_requests_that_share_a_context_know_nothing_of_each_other(tokenizer: Any) -> None:
    first, second = questions(sample(together=True), tokenizer)
    assert "What does line 100 say?" not in tokenizer.decode(second.ids)
    common = next(i for i, (a, b) in enumerate(zip(first.ids, second.ids, strict=False)) if a != b)
    assert common > 0.9 * len(first.ids)


def test_evidence_pages_hold_the_evidence(tokenizer: Any) -> None:
    for question, value in zip(questions(sample(), tokenizer), ("700", "2100"), strict=True):
        kept = "".join(tokenizer.decode(question.ids[page * 64 : page * 64 + 64]) for page in question.evidence)
        assert f"says {value}." in kept
        assert len(question.evidence) <= 2


@pytest.mark.parametrize("length", [63, 64, 65, 1000, 4096, 4097])
@pytest.mark.parametrize("budget", [0.07, 0.135, 0.5])
@pytest.mark.parametrize("name", ["recency", "evidence"])
def test_named_sets_keep_to_the_budget(name: str, budget: float, length: int) -> None:
    """The server takes them, every set has exactly as many pages as the budget allows, and evidence is among them."""
    turn = Turn("", ("x",), 200)
    last = (length - 1) // 64
    evidence = tuple(sorted({last // 3, last // 2}))
    question = Question(Sample("s", "s", "t", length, "", (turn,)), 0, tuple(range(length)), evidence)
    config = {"window": 64, "min_pages": 4, "floor_tokens": 128, "recent_pages": 4, "prompt_pages": 0}
    options = Arm(name, budget).options(question, config)
    parsed = RequestOptions.parse({"lsa": options}, LSAConfig())
    assert [given.tokens for given in parsed.sets] == list(range(length, length + 200 + 64, 64))
    for given in parsed.sets:
        pages = -(-given.tokens // 64)
        kept = {*given.positions, *range(given.tail_start, pages)}
        assert len(kept) == min(pages, max(4, int(pages * budget)))
        assert set(range(pages - max(1, min(4, len(kept) // 4)), pages)) <= kept
        if name == "evidence" and len(kept) > 3:
            assert {0, *evidence} <= kept
        if name == "recency":
            assert kept == set(range(pages - len(kept), pages))


def test_every_arm_is_one_that_the_server_takes() -> None:
    turn = Turn("", ("x",), 20)
    question = Question(Sample("s", "s", "t", 4096, "", (turn,)), 0, tuple(range(4000)), (3,))
    config = LSAConfig(indexer="somewhere")
    for name in ARMS:
        parsed = RequestOptions.parse({"lsa": Arm(name, 0.1).options(question, dataclasses.asdict(config))}, config)
        assert parsed.dense == (name == "full")
        assert not parsed.groups, "arms of a question would read each other's pages"
    unknown = dataclasses.replace(question, evidence=())
    assert [arm.name for arm in asked_of(parse_arms(["evidence", "quest"], [0.1]), unknown)] == ["full", "quest"]
    assert [str(arm) for arm in parse_arms(["quest", "full"], [0.1, 0.05])] == ["full", "quest 10.0%", "quest 5.0%"]


def test_a_variant_is_the_trained_indexer_with_options_of_a_request() -> None:
    turn = Turn("", ("x",), 20)
    question = Question(Sample("s", "s", "t", 4096, "", (turn,)), 0, tuple(range(4000)), (3,))
    *_, one, other = parse_arms(["quest"], [0.1, 0.2], variants=['near={"dense_steps": 2}'])
    assert (str(one), str(other), one.name) == ("lsa_near 10.0%", "lsa_near 20.0%", "lsa")
    config = dataclasses.asdict(LSAConfig(indexer="somewhere"))
    assert other.options(question, config) == {"policy": "indexer", "budget": 0.2, "groups": False, "dense_steps": 2}


@pytest.mark.parametrize("given", ["near", "near=", "near=2", "near={}", "=[]", "a b={}", "apart={}", "x={"])
def test_wrong_variants_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"--variant .*: write NAME=JSON"):
        parse_arms(["quest"], [0.1], variants=[given])
    with pytest.raises(ValueError, match="leave policy and budget"):
        parse_arms(["quest"], [0.1], variants=['x={"budget": 0.1}'])
    with pytest.raises(ValueError, match=r"--variant x=.*unknown key 'dense'"):
        parse_arms(["quest"], [0.1], variants=['x={"dense": 1}'])
    with pytest.raises(ValueError, match="--variant x, x: give each another name"):
        parse_arms(["quest"], [0.1], variants=['x={"dense_steps": 1}', 'x={"dense_steps": 2}'])


@pytest.mark.parametrize(
    ("names", "budgets", "words"),
    [(["best"], [0.1], "--arms best: there is no such arm"), (["quest"], [0.0], "--budgets 0.0 is out of range")],
)
def test_wrong_arms_are_refused(names: list[str], budgets: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_arms(names, budgets)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    assert match_all("Red, BLUE", ("red", "blue", "green", "x")) == 0.5
    assert match_any("it is Red", ("red", "blue")) == 1.0 and match_any("it is", ("red",)) == 0.0
    assert first_number("about -12 or 13", ("-12",)) == 1.0 and first_number("none", ("1",)) == 0.0
    assert copied(" the text \n", ("the text",)) == 1.0 and 0.5 < copied("the te", ("the text",)) < 1
    references = ("one two three four", "one two nine ten", "six seven")
    assert copied("one two three four", references) == 1.0
    assert [copied(text, references) for text in ("one two nine ten", "six seven", "")] == [0.0, 0.0, 0.0]
    assert 0 < copied("one two three", references) < 1
    assert first_number("It is 9,987.", ("9987",)) == 1.0
    assert choice("(B) because A", ("B",)) == 1.0 and choice("Anyhow C", ("A",)) == 0.0
    assert words("Long-term approach!", ("long term approach",)) == 1.0 and words("it is 13", ("3",)) == 0.0
