"""A budget of ``auto`` on a real server with the shipped indexer: each request has as many pages as it needs."""

from __future__ import annotations

import urllib.error
from typing import Any

import pytest

from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
FLAGS = "--lsa-budget auto --lsa-indexer smollm2-135m-instruct --lsa-min-context 1024 --lsa-device-tokens 16384"
MORE = "--lsa-host-memory-gb 2 --chunked-prefill-size 2048 --skip-server-warmup"


def test_sets_are_as_large_as_they_need_to_be(model_path: str, tmp_path: Any) -> None:
    flags = ["--model-path", model_path, *FLAGS.split(), *MORE.split()]
    text = " ".join(f"Line {number} of the ledger says {number * 7919 % 1000}." for number in range(150))
    with ServerProcess(LSA, flags, tmp_path / "server.log") as server:
        server.wait_until_ready()
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
