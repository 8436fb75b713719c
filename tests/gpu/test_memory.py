"""Contexts beyond the device pool on a GPU: streamed prompts against stock, late copies, long generations."""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gpu_servers import AS_LSA_ATTENDS, READY_SECONDS, SERVED, STOCK
from prompts import needle, prose
from serving import (
    BFLOAT16_STEPS,
    Answer,
    finished_request,
    flush_cache,
    gap_at_first_difference,
    generate,
    wait_until_idle,
)

from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
SUPPORT = pathlib.Path(__file__).resolve().parents[1] / "support"
POOL = 2048
CONTEXT = 12_288
SMALL = ["--lsa-device-tokens", str(POOL), "--lsa-host-memory-gb", "1", "--lsa-min-context", "512", "--lsa-debug"]
SMALL += ["--lsa-config", '{"groups": false, "floor_tokens": 512}', "--lsa-calibrate", "never"]
SMALL += ["--chunked-prefill-size", "512", "--max-running-requests", "16"]
SMALL += ["--cuda-graph-max-bs-decode", "16", "--context-length", str(CONTEXT)]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, extra: list[str]) -> Iterator[dict[str, ServerProcess]]:
    """``large``: stock, whose pool holds everything; ``small``: LSA with 32 pages; ``slow``: the same, always late."""
    folder = pathlib.Path(os.environ.get("SGLANG_LSA_TEST_LOGS", "") or tmp_path_factory.mktemp("logs"))
    few = ["--max-running-requests", "16", "--cuda-graph-max-bs-decode", "8", "--max-total-tokens", "48000"]
    kinds = {
        "large": (STOCK, [*AS_LSA_ATTENDS, *few, "--chunked-prefill-size", "512"]),
        "small": (LSA, SMALL),
        "slow": ("slow_server", SMALL),
    }
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": path, "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    servers = {
        name: ServerProcess(
            module,
            ["--model-path", str(embedded_model_path()), *SERVED, *flags, *extra],
            folder / f"{name}.log",
            environment,
        )
        for name, (module, flags) in kinds.items()
    }
    try:
        for server in servers.values():
            server.wait_until_ready(READY_SECONDS)
        yield servers
        os.kill(servers["small"].process.pid, signal.SIGTERM)  # in good order: see test_memory_is_unlocked
        servers["small"].process.wait(60)
        assert "LSA: host mirror released" in servers["small"].log.read_text(errors="replace")
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture(autouse=True)
def nothing_is_left(started: dict[str, ServerProcess]) -> Iterator[None]:
    yield
    for name in ("small", "slow"):
        assert started[name].process.poll() is None
        physical = wait_until_idle(started[name])["physical"]
        assert (physical["held"], physical["promised"]) == (0, 0)


def long_prompts() -> list[str]:
    """Up to four times the pool, the last three over a shared prefix."""
    shared = prose(3000, 5)
    plain = [needle(length, 0.4, length).prompt for length in (2300, 4100, 8000)]
    return [*plain, prose(5000, 1), *(f"{shared} {prose(40 + 500 * i, 60 + i)}" for i in range(3))]


def prefilled(server: ServerProcess, prompt: str) -> tuple[np.ndarray, Answer]:
    """Logarithmic probability of every token of a prompt, and the first token of the answer."""
    parameters = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    body = {"text": prompt, "sampling_params": parameters, "return_logprob": True, "top_logprobs_num": 5}
    meta = server.post("/generate", body | {"logprob_start_len": 0})["meta_info"]
    chances = np.array([value for value, _, _ in meta["input_token_logprobs"][1:]])
    (top,) = meta["output_top_logprobs"]
    return chances, [(meta["output_token_logprobs"][0][1], {token: value for value, token, _ in top})]


def nearly_the_same(one: ServerProcess, another: ServerProcess, prompt: str) -> None:
    """The probability of nearly every token of the prompt, and the next token, as far as bfloat16 tells.

    Texts of random words are judged by the median: in bfloat16 a few of their tokens have log-probabilities that are
    several units from those in float32, with stock SGLang as well.
    """
    (expected, first), (seen, other) = (prefilled(server, prompt) for server in (one, another))
    apart = np.abs(expected - seen)
    gap = gap_at_first_difference(first, other)
    print(f"\n{len(expected)} tokens: median {np.median(apart):.4f}, mean {apart.mean():.4f}, next token {gap}")
    assert np.median(apart) < 0.1
    assert gap is None or gap <= BFLOAT16_STEPS


def test_prompts_four_times_the_pool_equal_stock(started: dict[str, ServerProcess]) -> None:
    """Prompts of up to four pools, streamed."""
    before = started["small"].get("/lsa/status")["prefill"]["streamed_pages"]
    for prompt in long_prompts():
        nearly_the_same(started["large"], started["small"], prompt)
    assert started["small"].get("/lsa/status")["prefill"]["streamed_pages"] > before + 100


def test_late_copies_and_passes_change_no_answer(started: dict[str, ServerProcess]) -> None:
    """Prompts in place, whose texts then outgrow the pool: the same pages are read, and the same is said.

    Pages that left the set stay where they are until their place is needed, so a text within the pool recalls nothing.
    Where pages are late, the device waits for them.
    """
    prompts = [
        (prose(length, length), new) for length, new in ((90, 200), (900, 200), (1300, 900), (1500, 800), (1700, 800))
    ]
    texts, sets = {}, {}
    for name in ("small", "slow"):
        flush_cache(started[name])
        rids = [f"{name}-{number}" for number in range(len(prompts))]
        texts[name] = [
            generate(started[name], prompt, new, rid, policy="random")["text"]
            for (prompt, new), rid in zip(prompts, rids, strict=True)
        ]
        sets[name] = [finished_request(started[name], rid)["sets"] for rid in rids]
    status = started["slow"].get("/lsa/status")
    print({name: status[name] for name in ("recalls", "stalls", "prefill", "pressure", "failures")})
    assert status["recalls"]["pages"] > 10
    assert sets["slow"] == sets["small"]
    assert texts["slow"] == texts["small"]


def test_late_copies_and_passes_change_no_streamed_prompt(started: dict[str, ServerProcess]) -> None:
    """Which pages are read in place depends on time here, so sums are rounded differently; no more than that."""
    for prompt in long_prompts():
        nearly_the_same(started["small"], started["slow"], prompt)
    assert started["slow"].get("/lsa/status")["failures"] == {"refreshes": 0, "batches": 0, "integrity": 0}


@pytest.mark.parametrize("name", ["small", "slow"])
def test_all_at_once_over_a_tiny_pool(started: dict[str, ServerProcess], name: str) -> None:
    """Twelve prompts of up to four pools each, at the same time; all answer in full."""
    server = started[name]
    prompts = [*long_prompts(), *(prose(300 * i, i) for i in range(1, 6))]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: generate(server, prompt, 120), prompts))
    assert [answer["meta_info"]["completion_tokens"] for answer in together] == [120] * len(prompts)
    print({key: server.get("/lsa/status")[key] for key in ("pressure", "stalls", "recalls", "prefill")})


def test_a_generation_of_8192_tokens_loses_no_page(started: dict[str, ServerProcess]) -> None:
    """Four times the pool, all of it generated: every page is mirrored, can be chosen, and stays within the budget."""
    server = started["small"]
    flush_cache(server)
    answer = generate(server, prose(150, 3), 8192, "long-generation", budget=0.135)
    assert answer["meta_info"]["completion_tokens"] == 8192
    status = wait_until_idle(server)
    seen = finished_request(server, "long-generation")
    pages = seen["context_pages"]
    assert status["stores"]["pages"] >= pages - 1
    assert seen["resident_pages"] <= max(8, pages * 0.135) + 3
    chosen = {position for positions in seen["history"] for position in positions}
    assert any(3 < position < pages - 40 for position in chosen), "pages that were generated long ago are chosen"
    assert (seen["failures"], seen["stalls"], status["failures"]["batches"]) == (0, 0, 0)
    print({key: value for key, value in seen.items() if key not in ("history", "sets")})
