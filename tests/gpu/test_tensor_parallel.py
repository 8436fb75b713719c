"""Two GPUs: what ``tests/server/test_tensor_parallel.py`` asks of two ranks on a CPU, over NCCL, with CUDA graphs."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
import rank_bodies as ranks
import torch
from tensor_parallel import GPUS

from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def path(folder: pathlib.Path) -> str:
    return GPUS.model(folder / "llama", "llama")


@pytest.fixture(scope="module")
def plain(folder: pathlib.Path, path: str) -> Iterator[ServerProcess]:
    with ranks.small(GPUS, LSA, path, folder / "plain.log") as server:
        yield server


@pytest.fixture(scope="module")
def late(folder: pathlib.Path, path: str) -> Iterator[ServerProcess]:
    """Every copy of rank 1 begins 10 ms late."""
    with ranks.small(GPUS, ranks.FAULTS, path, folder / "late.log") as server:
        yield server


@pytest.mark.parametrize("family", GPUS.sizes)
def test_with_all_pages_they_say_what_stock_says(family: str, folder: pathlib.Path) -> None:
    path = GPUS.model(folder / f"{family}-exact", family)
    expected = ranks.stock_answers(GPUS, path, folder / f"stock-{family}.log")
    with ranks.small(GPUS, LSA, path, folder / f"{family}.log") as server:
        ranks.all_pages_are_what_stock_says(server, expected)


@pytest.mark.parametrize("name", ["plain", "late"])
def test_dense_requests_are_retracted_together(name: str, request: pytest.FixtureRequest) -> None:
    ranks.dense_requests_are_retracted_together(request.getfixturevalue(name), GPUS)


def test_sets_are_read_from_the_token_on_that_they_name(late: ServerProcess, plain: ServerProcess) -> None:
    ranks.sets_are_read_from_the_token_on_that_they_name(late, plain)


@pytest.mark.parametrize("name", ["plain", "late"])
def test_under_pressure_their_records_stay_the_same(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.records_stay_the_same_under_pressure(request.getfixturevalue(name), GPUS, 500, monkeypatch, None)


@pytest.mark.parametrize("when", ["oomfirst", "oomlast"])
def test_memory_that_runs_out_on_one_rank(late: ServerProcess, when: str) -> None:
    ranks.memory_runs_out_on_one_rank(late, when, GPUS)
