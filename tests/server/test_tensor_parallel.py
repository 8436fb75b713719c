"""Two ranks on one CPU: they say what stock SGLang's two ranks say, have the same records after every forward pass, and
fail together. ``tests/unit/test_simulated_ranks.py`` has more of it, without servers."""

from __future__ import annotations

import json
import pathlib
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import soak
from families import VOCABULARY, Answered, ask, random_prompt
from serving import assert_idle, finished_request, flush, is_busy, wait_until_idle
from tensor_parallel import FLAGS, environment, model

from sglang_lsa.server_process import LSA, STOCK, ServerProcess

pytestmark = pytest.mark.server
SMALL = [*FLAGS, "--lsa-device-tokens", "2048", "--lsa-host-memory-gb", "0.04", "--lsa-min-context", "256"]
SMALL += ["--lsa-window", "16", "--lsa-staging-pages", "4", "--lsa-debug", "--enable-priority-scheduling"]
"""32 pages on the device of each rank. Records are compared after every pass."""
LATE = "tensor_parallel"
"""Copies and passes end late, and those of rank 1 later still; see there what else goes wrong."""
PROMPTS = (90, 700, 1300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def plain(folder: pathlib.Path) -> Iterator[ServerProcess]:
    """A model with 4 query heads and 2 KV heads."""
    flags = ["--model-path", model(folder / "llama", "llama"), *SMALL]
    with ServerProcess(LSA, flags, folder / "plain.log", environment()) as server:
        yield server.wait_until_ready()


@pytest.fixture(scope="module")
def late(folder: pathlib.Path) -> Iterator[ServerProcess]:
    """The same."""
    flags = ["--model-path", model(folder / "llama", "llama"), *SMALL]
    with ServerProcess(LATE, flags, folder / "late.log", environment()) as server:
        yield server.wait_until_ready()


def stock_answers(folder: pathlib.Path, path: str) -> list[Answered]:
    """What stock SGLang's two ranks say to :data:`PROMPTS`."""
    flags = ["--model-path", path, *FLAGS, "--max-total-tokens", "8192"]
    with ServerProcess(STOCK, flags, folder / "stock.log", environment()) as server:
        server.wait_until_ready()
        return [ask(server, random_prompt(tokens, tokens), 48) for tokens in PROMPTS]


def all_pages_are_what_stock_says(server: ServerProcess, expected: list[Answered]) -> None:
    for tokens, stock in zip(PROMPTS, expected, strict=True):
        assert ask(server, random_prompt(tokens, tokens), 48, budget=1.0).tokens == stock.tokens
    assert_idle(server)


def test_with_all_pages_they_say_what_stock_says(plain: ServerProcess, folder: pathlib.Path) -> None:
    all_pages_are_what_stock_says(plain, stock_answers(folder, str(folder / "llama")))


@pytest.mark.slow
def test_heads_as_of_a_model_that_people_serve(folder: pathlib.Path) -> None:
    """Qwen2.5-0.5B has 14 query heads and 2 KV heads: 7 and 1 on each rank."""
    path = model(folder / "qwen", "qwen2.5")
    expected = stock_answers(folder, path)
    with ServerProcess(LSA, ["--model-path", path, *SMALL], folder / "qwen.log", environment()) as server:
        all_pages_are_what_stock_says(server.wait_until_ready(), expected)


@pytest.mark.parametrize("name", ["plain", "late"])
def test_dense_requests_are_retracted_together(name: str, request: pytest.FixtureRequest) -> None:
    """Three fit the pool as prompts and outgrow it as answers."""
    server: ServerProcess = request.getfixturevalue(name)
    flush(server)
    with ThreadPoolExecutor(3) as pool:
        prompts = [random_prompt(560, seed) for seed in range(3)]
        together = list(pool.map(lambda prompt: ask(server, prompt, 300, enabled=False), prompts))
    assert "Retract requests" in server.log.read_text(errors="replace")
    assert [len(answered.tokens) for answered in together] == [300] * 3
    assert ask(server, prompts[0], 300, enabled=False).tokens == together[0].tokens
    assert_idle(server)


@pytest.mark.parametrize(
    ("name", "requests"), [("plain", 120), ("late", 150), pytest.param("late", 500, marks=pytest.mark.slow)]
)
def test_under_pressure_their_records_stay_the_same(
    name: str, requests: int, plain: ServerProcess, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that ask, abort, hang up and change the configuration. A sample of the answers is had again on the same
    server, where copies are late again, or not; and where they are not."""
    server: ServerProcess = request.getfixturevalue(name)
    monkeypatch.setattr(soak, "VOCABULARY", (3, VOCABULARY))
    checks = server.get("/lsa/status")["ranks"]["checks"]
    asked = soak.Soak(server, seed=5)
    outcomes = asked.run(requests)
    status = wait_until_idle(server)
    seen = asked.check(outcomes[::6])
    if server is not plain:
        asked.server = plain
        asked.check(outcomes[::12])
    print(json.dumps(seen | {part: status[part] for part in ("ranks", "pressure", "failures", "recalls", "evictions")}))
    assert status["ranks"]["checks"] > checks + 500
    assert status["failures"] == {"refreshes": 0, "batches": 0, "integrity": 0}
    assert status["recalls"]["pages"] > 100
    assert seen["answered"] > requests / 12
    assert_idle(server)
    flush(server)


@pytest.mark.parametrize("when", ["oomfirst", "oomlast"], ids=["before its pages had places", "afterwards"])
def test_memory_that_runs_out_on_one_rank(late: ServerProcess, when: str) -> None:
    """The prompt fails, the request that runs beside it does not, and both ranks go on with the same records."""
    flush(late)
    alone = ask(late, random_prompt(700, 3), 120, "alone", budget=0.3)
    flush(late)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, late, random_prompt(700, 3), 120, "beside", budget=0.3)
        while not is_busy(late) and not running.done():
            pass
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(late, random_prompt(1300, 4), 8, f"{when}-1")
        assert "Memory ran out" in refused.value.read().decode()
        beside = running.result()
    if finished_request(late, "beside")["sets"] == finished_request(late, "alone")["sets"]:
        assert beside.tokens == alone.tokens
    assert len(beside.tokens) == 120
    assert len(ask(late, random_prompt(1900, 5), 40, budget=0.2).tokens) == 40
    assert "LSA: ranks have different records" not in late.log.read_text(errors="replace")
    assert_idle(late)
    flush(late)
