"""The demo without servers: documents, scoring, what is read out of a status, picture, command line."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import signal
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import sglang_lsa
from sglang_lsa import cli
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.demo import run as demo
from sglang_lsa.demo.client import Answer
from sglang_lsa.demo.measure import Phase
from sglang_lsa.demo.picture import CHOSEN, NOT_RESIDENT, NOT_WRITTEN, RECENT, SINK, Panel, draw, residency_map
from sglang_lsa.demo.report import make_console, step
from sglang_lsa.demo.servers import DemoFailed
from sglang_lsa.demo.verdict import lost_answers, print_verdict
from sglang_lsa.demo.watch import busiest, gained
from sglang_lsa.embedded_model import EmbeddedModelError, embedded_model_path
from sglang_lsa.texts.document import (
    FACTS,
    FILLER,
    INSTRUCTION,
    Document,
    Fact,
    Question,
    build_document,
    count_tokens,
    fact_pages,
    load_tokenizer,
    prompt_tokens,
)
from sglang_lsa.texts.haystack import SENTENCE, Haystack

MODEL_CONTEXT = 8192


def answer_of(text: str, right: bool) -> Answer:
    return Answer("rid", text, right, 6600, 6528, 20, 0.5, 0.04, 0.04)


def phase_of(name: str, answers: list[Answer]) -> Phase:
    return Phase(name, answers, [], {}, None, 0, 0, 1.0)


# --- documents -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    try:
        return load_tokenizer(embedded_model_path(progress=False))
    except EmbeddedModelError as error:
        pytest.skip(f"needs the embedded model: {error}")


@pytest.fixture(scope="module")
def documents(tokenizer: Any) -> list[Document]:
    return [build_document(tokenizer, fact) for fact in FACTS]


def test_facts_differ() -> None:
    assert len({fact.word for fact in FACTS}) == len({fact.number for fact in FACTS}) == len(FACTS)
    filler = [fact.depth for fact in FACTS if fact.speech is None]
    assert filler == sorted(filler) and len(filler) == 2, "the shared prefix gets no shorter"
    assert [fact.speech is None for fact in FACTS] == [True, True, False]


@pytest.mark.parametrize("index", range(len(FACTS)), ids=[fact.word for fact in FACTS])
def test_document_has_the_length_asked_for_and_one_fact(tokenizer: Any, documents: list[Document], index: int) -> None:
    document = documents[index]
    longest = 100 if document.fact.speech is not None else count_tokens(tokenizer, " " + FILLER)
    assert document.fact.document_tokens - longest <= document.tokens <= document.fact.document_tokens
    assert document.text.count(document.fact.number) == 1
    assert not any(fact.number in document.text for fact in FACTS if fact != document.fact)


@pytest.mark.parametrize("index", range(len(FACTS)), ids=[fact.word for fact in FACTS])
def test_fact_lies_where_its_depth_says(tokenizer: Any, documents: list[Document], index: int) -> None:
    question = Question(documents[index], demo.WORDINGS[0])
    pages = fact_pages(tokenizer, question)
    assert len(pages) in (1, 2) and pages[-1] - pages[0] == len(pages) - 1
    expected = documents[index].fact.depth * prompt_tokens(tokenizer, question) / PAGE_SIZE
    assert abs(pages[0] - expected) <= 2


def test_running_text_is_sentences_of_a_speech(documents: list[Document]) -> None:
    document = documents[-1]
    assert document.fact.speech is not None and FILLER not in document.text
    speeches = " ".join(Haystack().documents)
    before, after = (part.strip() for part in document.text.removeprefix(INSTRUCTION).split(document.fact.sentence))
    for part in (before, after):
        whole = re.split(SENTENCE, part)
        assert len(whole) > 20 and all(sentence in speeches for sentence in whole)
    assert FILLER in documents[0].text


def test_fact_pages_are_exact(tokenizer: Any, documents: list[Document]) -> None:
    question = Question(documents[0], demo.WORDINGS[0])
    ids = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    pages = fact_pages(tokenizer, question)
    assert question.document.fact.number in tokenizer.decode(ids[pages[0] * PAGE_SIZE : (pages[-1] + 1) * PAGE_SIZE])
    assert len(ids) == prompt_tokens(tokenizer, question)


def test_prompts_leave_room_for_the_longest_answer(tokenizer: Any, documents: list[Document]) -> None:
    for document in documents:
        for wording in demo.WORDINGS:
            question = Question(document, wording)
            assert document.fact.word in question.text
            assert prompt_tokens(tokenizer, question) + demo.PICTURE_TOKENS < MODEL_CONTEXT


def test_questions_share_their_document_as_prefix(documents: list[Document]) -> None:
    contents = [Question(documents[0], wording).messages[0]["content"] for wording in demo.WORDINGS]
    assert all(content.startswith(documents[0].text) for content in contents)


def test_contexts_are_several_times_the_device_pool(documents: list[Document]) -> None:
    tokens = sum(document.tokens for document in documents) * len(demo.WORDINGS)
    assert tokens > 4 * (demo.CONFIG.device_tokens or 0)
    assert max(document.tokens for document in documents) + demo.PICTURE_TOKENS < (demo.CONFIG.device_tokens or 0)


def test_document_that_is_too_short_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="document_tokens 20 leaves no room"):
        build_document(tokenizer, Fact("harbor", "7316452", 0.5, 20))


# --- scoring -------------------------------------------------------------------------------------------------------

QUESTION = Question(Document(FACTS[0], "A text.", 3), "What is the number for {word}?")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (f"The number is {FACTS[0].number}.", True),
        (FACTS[0].number, True),
        (FACTS[0].number[:-1], False),
        (FACTS[1].number, False),
        ("", False),
    ],
    ids=["sentence", "bare", "a digit missing", "another document's", "empty"],
)
def test_an_answer_is_right_when_it_holds_the_number(text: str, right: bool) -> None:
    assert QUESTION.answered_by(text) is right


@pytest.mark.parametrize(
    ("full", "quest", "recency", "lost"),
    [(True, True, False, 0), (True, False, True, 1), (False, False, False, 0), (False, True, True, 0)],
    ids=["kept", "lost", "nobody knew", "only LSA knew"],
)
def test_only_what_full_attention_knew_can_be_lost(full: bool, quest: bool, recency: bool, lost: int) -> None:
    phases = [
        phase_of("quest", [answer_of("a", quest)]),
        phase_of("recency", [answer_of("b", recency)]),
    ]
    assert len(lost_answers([QUESTION], [answer_of("c", full)], phases)) == lost


def test_the_verdict_needs_a_reference(capsys: pytest.CaptureFixture[str]) -> None:
    console, wrong, right = make_console(), [answer_of("a", False)], [answer_of("a", True)]
    assert not print_verdict(console, wrong, [phase_of("quest", wrong)], [])
    assert print_verdict(console, right, [phase_of("quest", right)], [])
    assert not print_verdict(console, right, [phase_of("quest", wrong)], ["[bold] one"])
    assert "[bold] one" in capsys.readouterr().out, "an answer is no markup"


# --- status --------------------------------------------------------------------------------------------------------


def status_of(held: int, policies: list[str]) -> dict[str, Any]:
    running = {"requests": len(policies), "dense": policies.count("full"), "context_pages": 100 * len(policies)}
    return {"page_bytes": 10, "virtual": {"allocated": 250}, "physical": {"held": held}, "running": running}


def test_the_busiest_moment_has_every_request_past_prefill() -> None:
    samples = [
        status_of(120, ["quest", "quest", "full"]),
        status_of(14, ["quest"]),
        status_of(20, ["quest", "quest"]),
        status_of(21, ["quest", "quest"]),
        status_of(0, []),
    ]
    seen = busiest(samples)
    assert seen is not None
    assert (seen["requests"], seen["held_bytes"], seen["full_bytes"], seen["cached_bytes"]) == (2, 210, 2000, 2500)
    assert busiest([status_of(120, ["full"]), status_of(0, [])]) is None


def test_gains_are_differences() -> None:
    def counters(value: int) -> dict[str, Any]:
        return {
            "recalls": {"pages": value, "bytes": 10 * value},
            "evictions": 2 * value,
            "radix": {"prompt_tokens": 3 * value, "hit_tokens": 4 * value},
        }

    assert gained(counters(5), counters(7)) == {
        "recalled_pages": 2,
        "recalled_bytes": 20,
        "evicted_pages": 4,
        "prompt_tokens": 6,
        "prefix_hit_tokens": 8,
    }


# --- picture -------------------------------------------------------------------------------------------------------

PANEL = Panel("a request", [[0, 4, 17, 18], [0, 9, 18, 19], [0, 5, 19, 20]], 22 * PAGE_SIZE, 1, 3, [4, 5])


def test_residency_map_tells_sink_chosen_and_recent_apart() -> None:
    grid = residency_map(PANEL)
    assert grid.shape == (3, 22)
    assert (grid[:, 0] == SINK).all()
    assert [np.flatnonzero(row == CHOSEN).tolist() for row in grid] == [[4], [9], [5]]
    # The tail of the first window starts at page 19 and had not reached page 21 when the next window began.
    assert [np.flatnonzero(row == RECENT).tolist() for row in grid] == [
        [17, 18, 19, 20],
        [18, 19, 20, 21],
        [19, 20, 21],
    ]
    assert np.argwhere(grid == NOT_WRITTEN).tolist() == [[0, 21]]
    assert grid[1, 4] == NOT_RESIDENT


def test_residency_map_of_a_dense_request_has_no_holes() -> None:
    panel = dataclasses.replace(PANEL, history=[[]])
    assert (residency_map(panel) != NOT_RESIDENT).all()


def test_picture_is_a_png(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "picture.png"
    draw([PANEL, dataclasses.replace(PANEL, title="another", fact_pages=[5])], "Title", path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 <= width <= 3000 and 300 <= height <= 3000
    assert 10_000 < len(content) < 1_000_000


# --- what is printed -----------------------------------------------------------------------------------------------


def test_a_step_says_whether_it_worked(capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console()
    with step(console, "Counting", 2) as done:
        done()
    with pytest.raises(ZeroDivisionError), step(console, "Dividing"):
        1 / 0  # noqa: B018
    out = capsys.readouterr().out
    assert "✓ Counting" in out and "✗ Dividing" in out


# --- command line --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["demo", "--nonsense"]], ids=["none", "unknown", "unknown flag"])
def test_wrong_usage_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert "usage: sglang-lsa" in capsys.readouterr().err


def test_without_a_command_all_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    *help_text, last = shown.err.splitlines()
    assert last == "sglang-lsa: no command is given: use one of those above, for example sglang-lsa demo"
    assert all(any(line.strip().startswith(name) for line in help_text) for name in ("demo", "doctor", "eval", "view"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.split()[:2] == ["sglang-lsa", sglang_lsa.__version__]


def test_model_prints_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "embedded_model_path", lambda: tmp_path)
    assert cli.main(["model"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (True, 0, ""),
        (False, 1, ""),
        (DemoFailed("the server ended; the whole log: x.log"), 1, "x.log"),
        (EmbeddedModelError("no disk"), 1, "no disk"),
        (KeyboardInterrupt(), cli.INTERRUPTED, "interrupted"),
    ],
    ids=["kept", "lost", "server failed", "no model", "ctrl-c"],
)
def test_exit_status_of_the_demo(
    outcome: bool | BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(output: pathlib.Path, console: object) -> bool:
        assert output == tmp_path
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo", "--output", str(tmp_path)]) == status
    assert message in capsys.readouterr().err


def test_the_command_line_starts_without_torch() -> None:
    script = "import sys, sglang_lsa.cli; sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
