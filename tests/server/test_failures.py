"""When something breaks: the request fails, or keeps what it has; the server goes on, and says so."""

from __future__ import annotations

import os
import pathlib
import signal
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prompts import needle, prose
from serving import assert_idle, finished_request, flush, generate, is_busy, wait_until_idle
from soak import FLAGS, NARROW, Question, body, tokens_of

from sglang_lsa.server_process import LSA, ServerFailed, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.release]
SMALL = [*FLAGS, "--lsa-device-tokens", "2560", "--lsa-debug", "--lsa-host-memory-gb", "0.2"]
SMALL += ["--lsa-min-context", "512", "--lsa-window", "16", *NARROW]
SUPPORT = pathlib.Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="module")
def faulty(model_path: str, logs: pathlib.Path) -> Iterator[ServerProcess]:
    """A pool of 40 pages; see ``faulty_server`` for what goes wrong in it. Generated tokens enter its tree, too."""
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    flags = ["--model-path", model_path, *SMALL, "--lsa-cache-outputs"]
    with ServerProcess("faulty_server", flags, logs / "faulty.log", {"PYTHONPATH": path}) as server:
        yield server.wait_until_ready()


@pytest.fixture(autouse=True)
def goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every fault the server answers, holds nothing for anybody, and can be flushed."""
    yield
    if "faulty" in request.fixturenames and "sigterm" not in request.node.name:
        server = request.getfixturevalue("faulty")
        assert_idle(server)
        assert generate(server, prose(100, 1), tokens=4)["meta_info"]["completion_tokens"] == 4
        wait_until_idle(server)
        flush(server)


def failure(server: ServerProcess, prompt: str, rid: str, tokens: int = 24, **lsa) -> str:
    """What the server says to a request that fails."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        answer = generate(server, prompt, tokens, rid, **lsa)
        raise AssertionError(f"answered: {answer['meta_info']}")
    assert refused.value.code == 500
    return refused.value.read().decode()


@pytest.mark.parametrize("fault", ["oomplan", "oomlayer"], ids=["before the pass", "in its fourth layer"])
def test_out_of_memory_in_a_streamed_prompt(faulty: ServerProcess, fault: str) -> None:
    """Only this prompt fails, in the middle of its chunks; what ran before it says what it says alone."""
    generate(faulty, prose(700, 2), 1)
    alone = generate(faulty, prose(700, 2), 60)["text"]
    before = faulty.get("/lsa/status")["failures"]["batches"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, faulty, prose(700, 2), 60)
        while not is_busy(faulty) and not running.done():
            pass
        message = failure(faulty, prose(3900, 3), f"{fault}-1")
        assert "Memory ran out" in message and "injected" in message
        assert running.result()["text"] == alone
    assert faulty.get("/lsa/status")["failures"]["batches"] == before + 1
    assert f"memory ran out in a batch of 1 requests, which fail: ['{fault}-1']" in faulty.log.read_text()


def test_out_of_memory_in_decode(faulty: ServerProcess) -> None:
    """All requests of the step fail, and none that comes later."""
    assert "Memory ran out" in failure(faulty, prose(700, 4), "oomdecode-1")
    assert generate(faulty, prose(700, 4), 24)["meta_info"]["completion_tokens"] == 24


@pytest.mark.parametrize("fault", ["badswitch", "badtable"])
def test_a_refresh_that_fails_keeps_the_set_before_it(faulty: ServerProcess, fault: str) -> None:
    answer = generate(faulty, prose(1500, 5), 60, f"{fault}-1")
    assert answer["meta_info"]["completion_tokens"] == 60
    status = wait_until_idle(faulty)
    seen = finished_request(faulty, f"{fault}-1")
    assert seen["failures"] >= 2
    assert len(seen["history"]) == (1 if fault == "badswitch" else 0), "the first set, or none at all, to the end"
    assert status["failures"]["refreshes"] >= 2
    assert f"refreshing {fault}-1 failed; it keeps the pages that it has" in faulty.log.read_text()


def test_a_first_set_that_fails_leaves_a_streamed_prompt_its_tail(faulty: ServerProcess) -> None:
    """It cannot be read whole, and scoring fails: recent pages are chosen instead."""
    answer = generate(faulty, prose(3900, 6), 40, "badscore-1")
    assert answer["meta_info"]["completion_tokens"] == 40
    status = wait_until_idle(faulty)
    seen = finished_request(faulty, "badscore-1")
    assert seen["prefill"] == "streamed"
    assert seen["history"][0][-3:] == list(range(seen["prompt_tokens"] // 64))[-3:]
    assert status["fallbacks"] >= 1


def test_a_choice_of_prefix_that_fails_leaves_what_was_looked_at(faulty: ServerProcess) -> None:
    text = prose(2900, 7)
    generate(faulty, text, 1)
    answer = generate(faulty, f"{text}\n{prose(60, 8)}", 20, "badchoice-1", prefill="resident")
    assert answer["meta_info"]["completion_tokens"] == 20
    seen = finished_request(faulty, "badchoice-1")
    assert (seen["prefill"], seen["failures"]) == ("resident", 1)


def test_cache_outputs_keeps_what_was_generated(faulty: ServerProcess) -> None:
    """With ``--lsa-cache-outputs`` a second turn finds the first answer in the tree."""
    first = Question(tuple(range(1000, 1600)), (), 200)
    answer = [token for token, _ in tokens_of(faulty.post("/generate", body(first)))]
    second = faulty.post("/generate", body(Question((*first.prompt, *answer, *range(2000, 2050)), (), 4)))
    assert second["meta_info"]["cached_tokens"] > 600 + 128


@pytest.mark.slow
def test_sigterm_while_it_loads_ends_it(model_path: str, tmp_path: pathlib.Path) -> None:
    with ServerProcess(LSA, ["--model-path", model_path, *SMALL], tmp_path / "server.log") as server:
        while "server_args=" not in server.log.read_text(errors="replace"):
            assert server.process.poll() is None
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.wait(60)
        with pytest.raises(ServerFailed):
            server.wait_until_ready(5)
        with pytest.raises(ProcessLookupError):
            for _ in range(60):  # a child that was still importing notices when it is done with that
                os.killpg(server.process.pid, 0)
                time.sleep(1)


def test_sigterm_lets_answers_finish_and_unlocks_memory(faulty: ServerProcess) -> None:
    """The last test of this server."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, faulty, needle(1500, 0.5, 1).prompt, 250)
        while not is_busy(faulty):
            assert not running.done()
        os.kill(faulty.process.pid, signal.SIGTERM)
        assert running.result()["meta_info"]["completion_tokens"] == 250
    assert faulty.process.wait(60) is not None
    assert "LSA: host mirror released" in faulty.log.read_text()
