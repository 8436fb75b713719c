"""Which samples ``sglang-lsa eval`` makes, when, and which server they go to, without one."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.evaluation import command
from sglang_lsa.evaluation.arms import parse_arms
from sglang_lsa.evaluation.command import Files, Plan, make_questions


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_path())


def test_plans_make_fair_parts(tokenizer: Any) -> None:
    """Whatever is done when time is up has as many samples of every task and length."""
    plan = Plan(("ruler", "scbench"), ("niah_single_1", "kv"), (2048, 3072), 2)
    asked = make_questions(plan, tokenizer, Files())
    names = list(dict.fromkeys(question.sample.name for question in asked))
    assert names == [
        f"{task}-{length}-{number}"
        for number in range(2)
        for length in (2048, 3072)
        for task in ("ruler-niah_single_1", "scbench-kv")
    ]
    assert all(len(question.ids) + question.asked.new_tokens <= question.sample.length for question in asked)
    with pytest.raises(ValueError, match="--tasks best: no suite asked for has it"):
        dataclasses.replace(plan, tasks=("best",)).chosen()


def test_what_cannot_be_made_is_told_before_the_rest_is(tokenizer: Any) -> None:
    plan = Plan(("ruler",), ("niah_single_1",), (2048,), 1000)
    plan.require_samples(tokenizer)
    with pytest.raises(ValueError, match="64"):
        dataclasses.replace(plan, lengths=(2048, 64)).require_samples(tokenizer)
    with pytest.raises(ValueError, match="there is nothing to ask"):
        dataclasses.replace(plan, suites=(), tasks=()).require_samples(tokenizer)


def test_samples_are_made_while_a_server_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """And those of published files, which can be anything, before it does."""
    done: list[str] = []

    class Ready(Exception):
        pass

    @contextlib.contextmanager
    def starting(*given: Any) -> Iterator[Callable[[], str]]:
        def ready() -> str:
            raise Ready

        done.append("starts")
        yield ready

    def made(*given: Any) -> Any:
        done.append("made")
        return make_questions(*given)

    monkeypatch.setattr(command, "starting", starting)
    monkeypatch.setattr(command, "make_questions", made)
    plan, arms = Plan(("ruler",), ("niah_single_1",), (2048,), 1), parse_arms(["quest"], [0.5])
    common: dict[str, Any] = {
        "model": str(embedded_model_path()),
        "name": "a model",
        "arms": arms,
        "output": tmp_path,
        "command": "x",
    }
    with pytest.raises(Ready):
        command.evaluate(plan, Console(), **common)
    assert done == ["starts", "made"]
    files = Files(pathlib.Path(__file__).parents[1] / "data" / "longbench_v2.json")
    with pytest.raises(Ready):
        command.evaluate(dataclasses.replace(plan, suites=(), tasks=()), Console(), **common, files=files)
    assert done == ["starts", "made", "made", "starts"]


def test_samples_of_files_go_where_they_fit(tokenizer: Any) -> None:
    data = pathlib.Path(__file__).parents[1] / "data"
    files = Files(data / "longbench_v2.json", data / "longmemeval.json")
    plan = Plan((), (), (64, 512, 1024), 99)
    asked = make_questions(plan, tokenizer, files)
    every = list(files.samples(len, plan.lengths))
    assert {question.sample.suite for question in asked} == {"longbench_v2", "longmemeval"}
    assert len(asked) == len(every)
    for question in asked:
        needed = len(question.ids) + question.asked.new_tokens
        assert question.sample.length == min(length for length in plan.lengths if length >= needed)
    few = make_questions(dataclasses.replace(plan, lengths=(64,)), tokenizer, files)
    assert len(few) == sum(question.sample.length == 64 for question in asked)
    one = make_questions(dataclasses.replace(plan, samples=1), tokenizer, files)
    assert len(one) == len({(q.sample.suite, q.sample.task, q.sample.length) for q in asked})
