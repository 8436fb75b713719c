"""Groups on a GPU: FlashInfer's kernels and CUDA graphs first, then servers with and without graphs.

pytest tests/gpu/test_groups.py -k steps     # the kernels alone, in seconds
pytest tests/gpu/test_groups.py
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from gpu_servers import READY_SECONDS, SERVED
from prompts import prose
from read_together import (
    AGENTS,
    MEMORY_PAGES,
    Steps,
    ask_together,
    grouped,
    in_turns,
    leave_one_by_one,
    named,
    prompts,
)
from serving import BFLOAT16_STEPS, Answer, assert_idle, finished_request, gap_at_first_difference, generate

from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.slow]
TOKENS = 32


def test_steps() -> None:
    """What the stand-in of ``unit/test_together.py`` is asked, of FlashInfer, in CUDA graphs and without."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    wrapper = partial(BatchPrefillWithPagedKVCacheWrapper, kv_layout="NHD", backend="fa2")
    in_turns(Steps(wrapper, "cuda", torch.bfloat16, tolerance=2e-2))


@pytest.fixture(scope="module", params=["graphs", "eager"])
def groups(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, extra: list[str]):
    yield from server_of(
        request.param, ["--lsa-config", '{"groups": true, "floor_tokens": 512}'], tmp_path_factory, extra
    )


def server_of(
    kind: str, more: list[str], tmp_path_factory: pytest.TempPathFactory, extra: list[str]
) -> Iterator[ServerProcess]:
    folder = pathlib.Path(os.environ.get("SGLANG_LSA_TEST_LOGS", "") or tmp_path_factory.mktemp("logs"))
    flags = ["--model-path", str(embedded_model_path()), *SERVED, "--max-running-requests", "16", *more]
    flags += ["--disable-cuda-graph"] if kind == "eager" else ["--cuda-graph-max-bs-decode", "16"]
    flags += ["--lsa-device-tokens", "24000", "--lsa-host-memory-gb", "4", "--lsa-min-context", "1024", "--lsa-debug"]
    flags += ["--lsa-calibrate", "never"]
    with ServerProcess(LSA, [*flags, *extra], folder / f"groups-{kind}.log") as server:
        server.wait_until_ready(READY_SECONDS)
        ask_together(server, [(prompts()[0], {"enabled": False})], 1)  # the memory is there before the agents come
        yield server
        assert_idle(server)


def compare(server: ServerProcess, together: list[Answer]) -> int:
    """With what each says alone and reading everything; returns how many are equal."""
    alone = [ask_together(server, [(prompt, {"enabled": False})], TOKENS)[0] for prompt in prompts()]
    gaps = [gap_at_first_difference(*pair) for pair in zip(alone, together, strict=True)]
    print(f"\ngaps where answers part: {gaps}")
    assert all(gap is None or gap <= BFLOAT16_STEPS for gap in gaps)
    return gaps.count(None)


@pytest.mark.server
def test_all_pages_read_together_are_full_attention(groups: ServerProcess) -> None:
    before = grouped(groups)
    together = ask_together(groups, [(prompt, named(prompt)) for prompt in prompts()], TOKENS)
    after = grouped(groups)
    print(f"\n{after}")
    assert after["steps"] >= before["steps"] + TOKENS // 2
    assert after["saved_reads"] - before["saved_reads"] >= (after["steps"] - before["steps"]) * MEMORY_PAGES
    compare(groups, together)
    assert grouped(groups)["steps"] == after["steps"], "one request is no group"


@pytest.mark.server
def test_full_budget_is_in_no_group(groups: ServerProcess, stock: ServerProcess) -> None:
    before = grouped(groups)["steps"]
    together = ask_together(groups, [(prompt, {"budget": 1.0}) for prompt in prompts()], TOKENS)
    assert grouped(groups)["steps"] == before
    ask_together(stock, [(prompts()[0], {})], 1)  # the memory is in its tree, too
    expected = ask_together(stock, [(prompt, {}) for prompt in prompts()], TOKENS)
    gaps = [gap_at_first_difference(*pair) for pair in zip(expected, together, strict=True)]
    assert all(gap is None or gap <= BFLOAT16_STEPS for gap in gaps), gaps


@pytest.mark.server
def test_groups_choose_what_is_chosen_alone(groups: ServerProcess) -> None:
    """The first sets of agents that decode in groups are those of the same prompts alone; what is read beside them is
    counted. One is then aborted, one ends, and the others go on."""
    memory, before = prose(3000, 7), grouped(groups)
    texts = [f"{memory} {prose(60, 70 + agent)}" for agent in range(AGENTS)]
    generate(groups, memory, 1)
    alone = []
    for text in texts:
        generate(groups, text, 8, "alone", budget=0.9)
        alone.append(finished_request(groups, "alone")["history"][0])
    assert grouped(groups)["steps"] == before["steps"], "one request is no group"
    leave_one_by_one(groups, texts, 600, budget=0.9)
    together = [finished_request(groups, f"agent-{agent}")["history"][0] for agent in range(AGENTS)]
    same = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(alone, together, strict=True)]
    after = grouped(groups)
    print(f"\n{same} of the first sets in common; {after}")
    assert min(same) > 0.8
    assert after["saved_reads"] > before["saved_reads"]
    assert_idle(groups)
