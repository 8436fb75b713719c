"""What two ranks are asked and must answer, on a CPU over gloo and on two GPUs over NCCL alike."""

from __future__ import annotations

import json
import pathlib
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest
import soak
from families import VOCABULARY, Answered, Reference, ask, random_prompt
from serving import assert_idle, finished_request, flush, is_busy, wait_until_idle
from tensor_parallel import Place

from sglang_lsa.server_process import STOCK, ServerProcess

SMALL_POOL = ["--lsa-device-tokens", "2048", "--lsa-host-memory-gb", "0.04", "--lsa-min-context", "256"]
SMALL_POOL += ["--lsa-window", "16", "--lsa-debug", "--enable-priority-scheduling", *soak.NARROW]
"""32 pages on the device of each rank. Records are compared after every pass."""
FAULTS = "tensor_parallel"
"""LSA's server, with what goes wrong on rank 1."""
PROMPTS = (90, 700, 1300)
ANSWER = 48
"""Tokens after each of them."""
OUTGROWN = 180
"""Tokens of an answer with which three prompts of 560 need 36 pages."""


@contextmanager
def serving(place: Place, module: str, path: str, log: pathlib.Path, *flags: str) -> Iterator[ServerProcess]:
    """A server of two ranks as long as the body runs."""
    arguments = ["--model-path", path, *place.flags, *flags]
    with ServerProcess(module, arguments, log, place.variables()) as server:
        yield server.wait_until_ready(place.seconds)


def small(place: Place, module: str, path: str, log: pathlib.Path) -> AbstractContextManager[ServerProcess]:
    """With LSA and few device pages."""
    if place.exact:
        return serving(place, module, path, log, *SMALL_POOL)
    gigabytes = SMALL_POOL.index("--lsa-host-memory-gb") + 1
    larger = [*SMALL_POOL[:gigabytes], "1", *SMALL_POOL[gigabytes + 1 :]]
    return serving(place, module, path, log, *larger)


def stock_answers(place: Place, path: str, log: pathlib.Path) -> list[Answered]:
    """What stock SGLang's two ranks say to :data:`PROMPTS`."""
    module = STOCK if place.exact else "sglang.launch_server"
    with serving(place, module, path, log, *place.stock, "--max-total-tokens", "8192") as server:
        return [ask(server, random_prompt(tokens, tokens), ANSWER) for tokens in PROMPTS]


def all_pages_are_what_transformers_says(server: ServerProcess, reference: Reference) -> None:
    """With a budget of 1, the likeliest token after each. Float32."""
    for tokens in PROMPTS:
        prompt = random_prompt(tokens, tokens)
        said = ask(server, prompt, ANSWER, budget=1.0).tokens
        assert said == reference.read([*prompt, *said])[-1 - ANSWER : -1].argmax(-1).tolist()
    assert_idle(server)


def all_pages_are_what_stock_says(server: ServerProcess, expected: list[Answered]) -> None:
    """With a budget of 1, token for token."""
    for tokens, stock in zip(PROMPTS, expected, strict=True):
        assert ask(server, random_prompt(tokens, tokens), ANSWER, budget=1.0).tokens == stock.tokens
    assert_idle(server)


def dense_requests_are_retracted_together(server: ServerProcess, place: Place) -> None:
    """Three fit the pool as prompts and outgrow it as answers."""
    flush(server)
    with ThreadPoolExecutor(3) as pool:
        prompts = [random_prompt(560, seed) for seed in range(3)]
        together = list(pool.map(lambda prompt: ask(server, prompt, OUTGROWN, enabled=False), prompts))
    assert "Retract requests" in server.log.read_text(errors="replace")
    assert [len(answered.tokens) for answered in together] == [OUTGROWN] * 3
    if place.exact:
        assert ask(server, prompts[0], OUTGROWN, enabled=False).tokens == together[0].tokens
    assert_idle(server)


def records_stay_the_same_under_pressure(
    server: ServerProcess, place: Place, requests: int, monkeypatch: pytest.MonkeyPatch, also: ServerProcess | None
) -> None:
    """Clients that ask, abort, hang up and change the configuration. A sample of the answers is had again on the same
    server, where copies may be late again.

    Args:
        also: another server on which a smaller sample is had again.
    """
    monkeypatch.setattr(soak, "VOCABULARY", (3, VOCABULARY))
    checks = server.get("/lsa/status")["ranks"]["checks"]
    asked = soak.Soak(server, seed=5)
    outcomes = asked.run(requests)
    status = wait_until_idle(server)
    seen: dict[str, int] = {}
    if place.exact:
        seen = asked.check(outcomes[::6])
        assert seen["answered"] > requests / 12
        if also is not None:
            asked.server = also
            asked.check(outcomes[::12])
    print(json.dumps(seen | {part: status[part] for part in ("ranks", "pressure", "failures", "recalls", "evictions")}))
    assert status["ranks"]["checks"] > checks + 4 * requests
    assert status["failures"] == {"refreshes": 0, "batches": 0, "integrity": 0}
    assert status["recalls"]["pages"] > requests / 4
    if requests >= 80:  # fewer need not have all kinds
        assert {outcome.kind for outcome in outcomes} >= {"ask", "abort", "disconnect", "many", "again", "config"}
    assert_idle(server)
    flush(server)


def memory_runs_out_on_one_rank(late: ServerProcess, when: str, place: Place) -> None:
    """The prompt fails, the request that runs beside it does not, and both ranks go on with the same records.

    Args:
        when: ``oomfirst`` or ``oomlast``: before its pages have places on the device, or afterwards.
    """
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
    sets = [finished_request(late, name)["sets"] for name in ("alone", "beside")]
    if place.exact and sets[0] == sets[1]:
        assert beside.tokens == alone.tokens
    assert len(beside.tokens) == 120
    assert len(ask(late, random_prompt(1900, 5), 40, budget=0.2).tokens) == 40
    assert "LSA: ranks have different records" not in late.log.read_text(errors="replace")
    assert_idle(late)
    flush(late)


def sets_are_read_from_the_token_on_that_they_name(late: ServerProcess, plain: ServerProcess) -> None:
    """However late their pages: the same answer as where none is."""
    prompt = random_prompt(1500, 8)
    sets = [";".join(f"{1502 + 20 * n}:23:0,{first + n},{first + n + 5}" for n in range(6)) for first in (2, 9)]
    for told in sets:
        answers = [ask(server, prompt, 130, f"told {told[-2:]}", sets=told) for server in (plain, late, late)]
        assert [answered.tokens for answered in answers] == [answers[0].tokens] * 3
        read = [finished_request(server, f"told {told[-2:]}")["sets"] for server in (plain, late)]
        assert read[0] == read[1]
    assert_idle(late)
