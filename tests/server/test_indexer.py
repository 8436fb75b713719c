"""A server with the shipped indexer: budgets of ``auto``, and who votes over a prompt that the radix tree has."""

from __future__ import annotations

import pathlib
import urllib.error
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from serving import finished_request
from soak import NARROW

from sglang_lsa.indexer.checkpoint import read_checkpoint_config
from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
INDEXER = "smollm2-135m-instruct"
FLAGS = f"--lsa-budget auto --lsa-indexer {INDEXER} --lsa-min-context 1024 --lsa-device-tokens 9600"
# In bfloat16 a cached prefix changes the last bits, and pages whose scores are nearly equal change places.
MORE = "--lsa-host-memory-gb 2 --chunked-prefill-size 4096 --skip-server-warmup --dtype float32"


@pytest.fixture(scope="module")
def server(model_path: str, logs: pathlib.Path) -> Iterator[ServerProcess]:
    flags = ["--model-path", model_path, *FLAGS.split(), *MORE.split(), *NARROW]
    with ServerProcess(LSA, flags, logs / "indexer.log") as server:
        yield server.wait_until_ready()


def test_sets_are_as_large_as_they_need_to_be(server: ServerProcess) -> None:
    """Each request has as many pages as it needs."""
    text = " ".join(f"Line {number} of the ledger says {number * 7919 % 1000}." for number in range(150))
    status = server.get("/lsa/status")
    assert status["budget"] == "auto"
    assert 0 < status["indexer"]["expectation"]["pages"] < 1
    sizes = []
    for name, target in (("few", 0.3), ("many", 1.0), ("own", status["config"]["target_coverage"])):
        options = {"target_coverage": target, "max_budget": 0.8}
        params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True, "custom_params": {"lsa": options}}
        server.post("/generate", {"rid": name, "text": text, "sampling_params": params})
        (told,) = server.get(f"/lsa/requests?rid={name}")["finished"]
        assert told["budget"] == "auto" and 0 < told["expected_coverage"] <= 1
        assert 8 <= told["resident_pages"] <= told["budget_pages"] + 1
        sizes.append(told["resident_pages"])
    assert sizes[0] < sizes[1] and sizes[0] <= sizes[2] <= sizes[1], sizes
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post(
            "/generate",
            {"text": "x", "sampling_params": {"custom_params": {"lsa": {"budget": "auto", "policy": "recency"}}}},
        )
    assert refused.value.code == 400 and "does not go with the policy recency" in refused.value.read().decode()


def test_a_cached_prompt_chooses_the_same_pages(server: ServerProcess) -> None:
    """A prompt that the radix tree has leaves as many tokens to compute as vote for pages: 64 positions of the indexer,
    more than otherwise do, and more than come after full pages here."""
    voters = read_checkpoint_config(INDEXER).positions
    tokens = 32 * 64 + 40
    assert 32 < tokens % 64 < voters
    ids = np.random.default_rng(0).integers(1000, 40_000, tokens).tolist()
    answers: dict[str, Any] = {}
    for rid in ("first", "again"):
        sampling = {"temperature": 0, "max_new_tokens": 8, "custom_params": {"lsa": {"budget": 0.135}}}
        answers[rid] = server.post("/generate", {"rid": rid, "input_ids": ids, "sampling_params": sampling})
    finished = {rid: finished_request(server, rid) for rid in answers}
    assert answers["first"]["meta_info"]["cached_tokens"] == 0
    assert answers["again"]["meta_info"]["cached_tokens"] == (tokens - voters) // 64 * 64
    assert finished["first"]["sets"] == finished["again"]["sets"]
    assert answers["first"]["text"] == answers["again"]["text"]
