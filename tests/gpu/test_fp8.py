"""KV in FP8 on a GPU, with either attention backend: twice the tokens in the same bytes, and stock's tokens."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
from gpu_servers import READY_SECONDS, SERVED, STOCK
from prompts import prose
from serving import BFLOAT16_STEPS, Answer, complete, flush_cache, gap_at_first_difference, wait_until_idle

from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.memory.mirror import GB
from sglang_lsa.patches.compatibility import BACKENDS
from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
POOL_GB = 0.04
"""Of the embedded model: 58 pages in FP8, 29 in bfloat16."""
CHUNK = 512
COMMON = ["--chunked-prefill-size", str(CHUNK), "--max-running-requests", "16", "--cuda-graph-max-bs-decode", "8"]
WITH_LSA = ["--lsa-device-memory-gb", str(POOL_GB), "--lsa-host-memory-gb", "1", "--lsa-min-context", "512"]
WITH_LSA += ["--lsa-debug", "--lsa-config", '{"groups": false, "floor_tokens": 512}', "--lsa-calibrate", "never"]
FP8 = ["--kv-cache-dtype", "fp8_e4m3"]


@pytest.fixture(scope="module", params=["flashinfer", "fa3"])
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, extra: list[str]
) -> Iterator[dict[str, ServerProcess]]:
    """``stock`` and ``lsa`` with KV in FP8, ``wide`` LSA with KV in bfloat16 and a pool of the same bytes."""
    if request.param == "fa3":
        pytest.importorskip("sgl_kernel.flash_attn", reason="FlashAttention-3 is not here", exc_type=ImportError)
        if request.param not in BACKENDS["cuda"]:
            pytest.skip("LSA does not attend with FlashAttention-3")
    folder = pathlib.Path(os.environ.get("SGLANG_LSA_TEST_LOGS", "") or tmp_path_factory.mktemp("logs"))
    backend = ["--attention-backend", request.param]
    kinds = {
        "stock": (STOCK, [*FP8, "--max-total-tokens", "48000"]),
        "lsa": (LSA, [*FP8, *WITH_LSA]),
        "wide": (LSA, WITH_LSA),
    }
    model = ["--model-path", str(embedded_model_path()), *SERVED, *backend, *COMMON]
    servers = {
        name: ServerProcess(module, [*model, *flags, *extra], folder / f"fp8-{request.param}-{name}.log")
        for name, (module, flags) in kinds.items()
    }
    try:
        for server in servers.values():
            server.wait_until_ready(READY_SECONDS)
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def prompts() -> list[str]:
    """Of up to three chunks, all of which fit; the last two share a prefix."""
    return [prose(length, length) for length in (60, 300, 450, 900, 1300)] + [
        f"{prose(700, 99)} {prose(60, seed)}" for seed in (1, 2)
    ]


def answers(server: ServerProcess, custom_params: dict | None = None) -> list[Answer]:
    flush_cache(server)
    return [complete(server, prompt, 24, custom_params) for prompt in prompts()]


def test_a_pool_holds_twice_the_tokens(started: dict[str, ServerProcess]) -> None:
    narrow, wide = (started[name].get("/lsa/status") for name in ("lsa", "wide"))
    assert 2 * narrow["page_bytes"] == wide["page_bytes"]
    for pool in ("physical", "virtual"):
        assert narrow[pool]["pages"] // 2 in (wide[pool]["pages"], wide[pool]["pages"] + 1)
    pages = narrow["physical"]["kv_bytes"] // narrow["page_bytes"] - 1  # but for the padding
    assert 0.9 * POOL_GB * GB < pages * narrow["page_bytes"] <= POOL_GB * GB
    queries = [status["physical"]["overhead_bytes"]["queries"] for status in (narrow, wide)]
    assert queries[0] == queries[1], "they are in the model's type"


def test_full_budget_equals_stock(started: dict[str, ServerProcess]) -> None:
    """In FP8 a key on the border of two numbers may become either, so that parting takes more than a tie."""
    pairs = zip(answers(started["stock"]), answers(started["lsa"], {"lsa": {"budget": 1.0}}), strict=True)
    gaps = [gap_at_first_difference(*pair) for pair in pairs]
    print(f"\n{gaps.count(None)} of {len(gaps)} equal to stock; gaps where others part: {gaps}")
    assert gaps.count(None) >= len(gaps) - 2
    assert all(gap is None or gap <= BFLOAT16_STEPS for gap in gaps)
    physical = wait_until_idle(started["lsa"])["physical"]
    assert (physical["held"], physical["promised"]) == (0, 0)


def prefilled(server: ServerProcess, prompt: str) -> np.ndarray:
    """Logarithmic probability of every token of a prompt."""
    body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}}
    meta = server.post("/generate", body | {"return_logprob": True, "logprob_start_len": 0})["meta_info"]
    return np.array([value for value, _, _ in meta["input_token_logprobs"][1:]])


def test_streamed_prompts_are_stocks(started: dict[str, ServerProcess]) -> None:
    """A prompt of nearly two pools; judged by the median, as in bfloat16 (see ``test_memory.nearly_the_same``)."""
    lsa = started["lsa"]
    before = lsa.get("/lsa/status")
    prompt = prose(before["physical"]["pages"] * 64 * 16 // 10, 5)
    apart = np.abs(prefilled(started["stock"], prompt) - prefilled(lsa, prompt))
    print(f"\n{len(apart)} tokens: median {np.median(apart):.4f}, mean {apart.mean():.4f}")
    assert np.median(apart) < 0.15
    after = lsa.get("/lsa/status")
    assert after["prefill"]["streamed_pages"] > before["prefill"]["streamed_pages"]
    assert after["failures"] == {"refreshes": 0, "batches": 0, "integrity": 0}
