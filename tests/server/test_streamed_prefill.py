"""Prompts larger than the device pool: exact, beside running requests, and as good a prefix for others as any."""

from __future__ import annotations

import pathlib
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prompts import needle, prose
from serving import finished_request, flush, flush_cache, generate, running_requests, wait_until_idle
from soak import FLAGS

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.server_process import STOCK, ServerProcess

pytestmark = pytest.mark.server
POOL = 2048
LENGTH = 7900
"""Tokens: nearly four times the pool, and what the model's context holds."""


@pytest.fixture(scope="module")
def large(model_path: str, logs: pathlib.Path) -> Iterator[ServerProcess]:
    """Stock SGLang with the same model and type; its pool holds every prompt, and its chunks, too: for each chunk
    SGLang's attention for CPUs does the work of the whole prompt."""
    flags = ["--model-path", model_path, *FLAGS, "--max-total-tokens", "16000", "--chunked-prefill-size", "8192"]
    with ServerProcess(STOCK, flags, logs / "large.log") as server:
        yield server.wait_until_ready()


def prefilled(server: ServerProcess, prompt: str, tokens: int = 1, **lsa) -> tuple[np.ndarray, list[int]]:
    """Logarithmic probability of every token of a prompt and of its answer, and the tokens of the answer."""
    parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    if lsa:
        parameters["custom_params"] = {"lsa": lsa}
    body = {"text": prompt, "sampling_params": parameters, "return_logprob": True, "logprob_start_len": 0}
    meta = server.post("/generate", body)["meta_info"]
    known = [value for value, _, _ in meta["input_token_logprobs"][1:]]
    return np.array([*known, *(v for v, _, _ in meta["output_token_logprobs"])]), [
        token for _, token, _ in meta["output_token_logprobs"]
    ]


def same(expected: tuple[np.ndarray, list[int]], seen: tuple[np.ndarray, list[int]]) -> None:
    assert seen[1] == expected[1]
    apart = np.abs(expected[0] - seen[0])
    print(f"{len(apart)} tokens: mean {apart.mean():.1e}, largest {apart.max():.1e}")
    assert apart.max() < 2e-3


def test_prompts_four_times_the_pool_equal_stock(small: ServerProcess, large: ServerProcess) -> None:
    """Every token of the prompt and the next one, as stock SGLang has them; and again over a cached prefix."""
    flush(small)
    before = small.get("/lsa/status")["prefill"]["streamed_pages"]
    longest = prose(LENGTH * 10 // 11, LENGTH)
    shared = prose(2100, 5)  # a little more than the pool
    for prompt in (longest, f"{shared} {prose(40, 6)}", f"{shared} {prose(900, 7)}"):
        same(prefilled(large, prompt), prefilled(small, prompt))
    assert small.get("/lsa/status")["prefill"]["streamed_pages"] > before + 200
    plain = [generate(server, longest, tokens=1) for server in (large, small)]  # now over what the trees have
    assert plain[0]["text"] == plain[1]["text"]
    assert plain[1]["meta_info"]["cached_tokens"] > 7000


def test_full_budget_equals_stock_where_it_fits(small: ServerProcess, large: ServerProcess) -> None:
    """Prompt and answer take nearly all of the pool; the answer crosses pages."""
    for prompt, tokens in ((prose(1600, 8), 60), (prose(900, 9), 70)):
        expected, seen = prefilled(large, prompt, tokens), prefilled(small, prompt, tokens, budget=1.0)
        same(expected, seen)


def test_a_dense_prompt_beyond_the_pool_is_refused(small: ServerProcess) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        generate(small, prose(2700, 2), tokens=4, enabled=False)
    assert refused.value.code == 400
    message = refused.value.read().decode()
    assert "fewer than 1984" in message and "--lsa-device-tokens" in message


def test_running_requests_keep_their_sets(small: ServerProcess) -> None:
    """While a prompt of two pools is streamed, an answer under way reads what it reads alone, and says the same."""
    flush(small)
    prompt = needle(900, 0.5, 3).prompt
    generate(small, prompt, tokens=1)
    alone = generate(small, prompt, 100, "alone")["text"]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(generate, small, prompt, 100, "beside")
        while not any(r["window"] >= 1 for r in running_requests(small)):
            assert not running.done()
        long = pool.submit(generate, small, prose(4200, 4), 20, "long")
        assert running.result()["text"] == alone
        assert long.result()["meta_info"]["completion_tokens"] == 20
    seen = {rid: finished_request(small, rid) for rid in ("beside", "alone", "long")}
    assert seen["beside"]["sets"] == seen["alone"]["sets"]
    assert (seen["beside"]["shrunk"], seen["long"]["prefill"]) == (0, "streamed")


def test_many_prompts_beyond_the_pool_at_once(small: ServerProcess) -> None:
    """Nobody waits for ever, and each says what it says alone."""
    flush(small)
    prompts = [prose(length, length) for length in (300, 2400, 700, 5200, 1500, 2600)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: generate(small, prompt, 40), prompts))
    alone = [generate(small, prompt, 40) for prompt in prompts]
    first = [[answer["text"][:20] for answer in answers] for answers in (together, alone)]
    assert first[0] == first[1]
    assert [answer["meta_info"]["completion_tokens"] for answer in together] == [40] * len(prompts)


@pytest.mark.slow
def test_a_long_answer_loses_no_page(small: ServerProcess) -> None:
    """Generated pages are mirrored, scored and pruned like those of the prompt, however many there are."""
    flush(small)
    answer = generate(small, prose(150, 3), 2500, "long-answer")
    assert answer["meta_info"]["completion_tokens"] == 2500
    seen = finished_request(small, "long-answer")
    pages = seen["context_pages"]
    assert pages == pages_spanned(seen["context_tokens"], PAGE_SIZE) > POOL // 64
    assert seen["resident_pages"] <= max(8, pages * 0.135) + 2
    chosen = {position for positions in seen["history"] for position in positions}
    assert any(4 < position < pages - 12 for position in chosen), "pages that were generated long ago are chosen"
    assert (seen["failures"], seen["stalls"]) == (0, 0)


def test_answers_are_prefilled_again_exactly(small: ServerProcess, large: ServerProcess) -> None:
    """The next turn of a chat finds the first prompt in the tree, not what was answered under pruned attention."""
    flush(small)
    flush_cache(large)
    first = generate(small, prose(1400, 11), 200)
    turn = f"{prose(1400, 11)}{first['text']} {prose(30, 12)}"
    second = generate(small, turn, 1)
    prompt = first["meta_info"]["prompt_tokens"]
    assert prompt - 128 <= second["meta_info"]["cached_tokens"] <= prompt
    assert generate(large, turn, 1)["text"] == second["text"]


def test_the_radix_tree_gives_way_when_host_memory_is_full(small: ServerProcess) -> None:
    """Eight prompts of 31 pages over a mirror of 221: the oldest leave the tree, nobody fails."""
    flush(small)
    before = small.get("/lsa/status")["pressure"]["host_evicted_pages"]
    for seed in range(3, 11):
        generate(small, prose(1950, seed), tokens=4)
    status = wait_until_idle(small)
    assert status["virtual"]["allocated"] <= status["virtual"]["pages"] < 8 * 30
    assert status["pressure"]["host_evicted_pages"] > before
    assert generate(small, prose(1950, 10), tokens=4)["meta_info"]["cached_tokens"] > 1800, "the latest prompt is there"
    assert generate(small, prose(1950, 3), tokens=4)["meta_info"]["cached_tokens"] == 0, "the oldest is not"
