"""A server that may calibrate, and that nobody told how to choose pages, does it once and remembers."""

from __future__ import annotations

import pathlib

import pytest
from prompts import needle
from serving import finished_request, generate
from soak import NARROW

from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.release]

FLAGS = [
    "--lsa-calibrate",
    "cached",
    "--skip-server-warmup",
    "--lsa-device-tokens",
    "4800",
    "--lsa-host-memory-gb",
    "0.5",
    "--lsa-min-context",
    "512",
    *NARROW,
]


def test_first_start_calibrates_and_the_second_remembers(model_path: str, tmp_path: pathlib.Path) -> None:
    """The result is an indexer in the cache folder, which serves; a third kind of start, with another version in the
    cache, is a unit test."""
    flags = ["--model-path", model_path, "--served-model-name", "smollm2", *FLAGS]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    sample = needle(1500, 0.5, 3)
    seen = []
    for start in ("first", "second"):
        with ServerProcess(LSA, flags, tmp_path / start, environment) as server:
            server.wait_until_ready()
            answer = generate(server, sample.prompt, 16, rid="asked")["text"]
            status, request = server.get("/lsa/status"), finished_request(server, "asked")
        assert status["policy"] == "indexer"
        assert status["indexer"]["trained"] is False and status["indexer"]["heads"]
        assert status["config"]["indexer"].startswith(str(tmp_path / "cache" / "sglang-lsa" / "calibrations"))
        assert status["fallbacks"] == 0 and status["refreshes"] > 0
        seen.append((answer, request["policy"], status["indexer"]))
    assert seen[0] == seen[1]
    assert "LSA: calibrating with" in (tmp_path / "first").read_text()
    assert "heads found at start choose pages; an indexer trained for" in (tmp_path / "first").read_text()
    second = (tmp_path / "second").read_text()
    assert "LSA: calibrating with" not in second and "LSA: calibrated before" in second
