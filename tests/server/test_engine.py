"""``sgl.Engine(lsa_config=...)`` in ``examples/offline_batch.py``, and refusals at start. SGLang's own launcher serves
the fixture ``small``."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
from prompts import needle

from sglang_lsa.server_process import ServerFailed, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "offline_batch.py"
ASKED: dict[str, dict[str, object]] = {"indexer": {}, "full": {"enabled": False}, "quest": {"policy": "quest"}}


def test_engine_takes_a_config(model_path: str, tmp_path: pathlib.Path) -> None:
    """The example of a batch, with the shipped indexer, chunked prefill and no radix tree: the whole path runs, and
    reading everything is not affected by it."""
    sample = needle(1800, 0.5, 6)
    lines = [{"prompt": sample.prompt, "lsa": lsa, "ignore_eos": True} for lsa in ASKED.values()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {"indexer": "smollm2-135m-instruct", "device_tokens": 6400, "host_memory_gb": 0.5, "min_context": 512}
    config["floor_tokens"] = 512
    engine = {"skip_server_warmup": True, "disable_radix_cache": True, "chunked_prefill_size": 1024}
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLE), "--model-path", model_path, "--max-tokens", "80"),
            *("--lsa", json.dumps(config | {"debug": True}), "--engine", json.dumps(engine)),
            *("--input", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "answers.jsonl")),
            *("--status", str(tmp_path / "status.json")),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = dict(zip(ASKED, map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()), strict=True))
    status = json.loads((tmp_path / "status.json").read_text())
    asked = {how: status["requests"][answer["rid"]]["finished"][-1] for how, answer in answers.items()}
    assert {how: entry["policy"] for how, entry in asked.items()} == {how: how for how in ASKED}
    assert asked["indexer"]["resident_pages"] < asked["indexer"]["context_pages"] == asked["full"]["resident_pages"]
    assert status["fallbacks"] == 0
    assert all(sample.answer in answers[how]["answer"] for how in ("full", "indexer"))
    assert 0 < asked["indexer"]["coverage"] <= 1
    assert asked["full"]["coverage"] is asked["quest"]["coverage"] is None
    assert asked["indexer"]["history"] != asked["quest"]["history"]
    for entry, answer in zip(asked.values(), answers.values(), strict=True):
        assert answer["saved"].startswith(f"{entry['resident_pages']} of {entry['context_pages']} pages resident: ")
    resident, context = (sum(entry[f"{kind}_pages"] for entry in asked.values()) for kind in ("resident", "context"))
    assert f"3 prompts: {resident} of {context} pages resident: " in done.stdout


def test_refused_at_start(model_path: str, tmp_path: pathlib.Path) -> None:
    """The process ends before it loads a model; the other refusals are tested without a server."""
    flags = ["--model-path", model_path, "--lsa-host-memory-gb", "100000"]
    with ServerProcess("sglang_lsa.launch_server", flags, tmp_path / "refused.log") as server:
        with pytest.raises(ServerFailed):
            server.wait_until_ready()
        log = server.log.read_text()
        assert "--lsa-host-memory-gb 100000" in log and "GB are free: lower it" in log
        assert "Load weight" not in log
