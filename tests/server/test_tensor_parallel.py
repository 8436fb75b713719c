"""Two ranks on one CPU: they say what stock SGLang's two ranks say, have the same records after every forward pass, and
fail together. ``tests/unit/test_simulated_ranks.py`` has more of it, without servers; ``tests/gpu`` has the same on two
GPUs."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest
import rank_bodies as ranks
from families import Reference
from release import RELEASE
from tensor_parallel import CPU

from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(RELEASE.resolves_late, reason="several ranks are refused with this SGLang"),
]
LONG = "RANK_REQUESTS" in os.environ
MANY = int(os.environ.get("RANK_REQUESTS", 60))
"""Mixed requests; 500 take four minutes on two cores."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def path(folder: pathlib.Path) -> str:
    """A model with 4 query heads and 2 KV heads."""
    return CPU.model(folder / "llama", "llama")


@pytest.fixture(scope="module")
def plain(folder: pathlib.Path, path: str) -> Iterator[ServerProcess]:
    with ranks.small(CPU, LSA, path, folder / "plain.log") as server:
        yield server


@pytest.fixture(scope="module")
def late(folder: pathlib.Path, path: str) -> Iterator[ServerProcess]:
    """Copies and passes end late, and those of rank 1 later still; see there what else goes wrong."""
    with ranks.small(CPU, ranks.FAULTS, path, folder / "late.log") as server:
        yield server


def test_with_all_pages_they_say_what_stock_says(plain: ServerProcess, folder: pathlib.Path, path: str) -> None:
    ranks.all_pages_are_what_stock_says(plain, ranks.stock_answers(CPU, path, folder / "stock.log"))


@pytest.mark.parametrize("name", ["plain", "late"])
def test_dense_requests_are_retracted_together(name: str, request: pytest.FixtureRequest) -> None:
    ranks.dense_requests_are_retracted_together(request.getfixturevalue(name), CPU)


def test_sets_are_read_from_the_token_on_that_they_name(late: ServerProcess, plain: ServerProcess) -> None:
    ranks.sets_are_read_from_the_token_on_that_they_name(late, plain)


def test_under_pressure_their_records_stay_the_same(
    late: ServerProcess, plain: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it with copies that are late on one rank only."""
    ranks.records_stay_the_same_under_pressure(late, CPU, MANY, monkeypatch, plain)


def test_under_pressure_without_late_copies(plain: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.records_stay_the_same_under_pressure(plain, CPU, MANY // 2, monkeypatch, None)


@pytest.mark.parametrize("when", ["oomfirst", "oomlast"], ids=["before its pages had places", "afterwards"])
def test_memory_that_runs_out_on_one_rank(late: ServerProcess, when: str) -> None:
    ranks.memory_runs_out_on_one_rank(late, when, CPU)


def test_heads_as_of_a_model_that_people_serve(folder: pathlib.Path) -> None:
    """Qwen2.5-0.5B has 14 query heads and 2 KV heads: 7 and 1 on each rank. They say what transformers says, and in a
    long run, which has time for one server more, what stock SGLang's two ranks say."""
    path = CPU.model(folder / "qwen", "qwen2.5")
    expected = ranks.stock_answers(CPU, path, folder / "stock-qwen.log") if LONG else None
    with ranks.small(CPU, LSA, path, folder / "qwen.log") as server:
        ranks.all_pages_are_what_transformers_says(server, Reference(path))
        if expected is not None:
            ranks.all_pages_are_what_stock_says(server, expected)
