"""A prompt that the radix tree has leaves as many tokens to compute as vote for pages."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from serving import finished_request

from sglang_lsa.indexer.checkpoint import IndexerConfig, ModelShape
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
LAYERS = 6


def test_a_cached_prompt_chooses_the_same_pages(model_path: str, tmp_path: pathlib.Path) -> None:
    """64 positions of the indexer vote: more than otherwise do, and more than come after full pages here."""
    indexer = IndexerConfig(ModelShape(576, LAYERS, 9, 3, 64), ((1, 0), (3, 4)))
    MemoryIndexer(indexer).save(tmp_path / "indexer")
    voters = indexer.positions
    tokens = 32 * 64 + 40
    assert 32 < tokens % 64 < voters
    ids = np.random.default_rng(0).integers(1000, 40_000, tokens).tolist()
    flags = ["--model-path", model_path, "--skip-server-warmup", "--lsa-indexer", str(tmp_path / "indexer")]
    flags += ["--lsa-min-context", "1024", "--json-model-override-args", f'{{"num_hidden_layers": {LAYERS}}}']
    # In bfloat16 a cached prefix changes the last bits, and pages whose scores are nearly equal change places.
    flags += ["--dtype", "float32"]
    flags += ["--lsa-device-tokens", "9600", "--lsa-host-memory-gb", "1", "--chunked-prefill-size", "4096"]
    answers: dict[str, Any] = {}
    with ServerProcess(LSA, flags, tmp_path / "log") as server:
        server.wait_until_ready()
        for rid in ("first", "again"):
            body = {"rid": rid, "input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
            answers[rid] = server.post("/generate", body)
        finished = {rid: finished_request(server, rid) for rid in answers}
    assert answers["first"]["meta_info"]["cached_tokens"] == 0
    assert answers["again"]["meta_info"]["cached_tokens"] == (tokens - voters) // 64 * 64
    assert finished["first"]["sets"] == finished["again"]["sets"]
    assert answers["first"]["text"] == answers["again"]["text"]
