"""``sgl.Engine(lsa_config=...)``, and refusals at start. SGLang's own launcher serves the fixture ``small``."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from prompts import needle

from sglang_lsa.server_process import ServerFailed, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]

ENGINE = """
import json, sys
import sglang as sgl
if __name__ == "__main__":
    model, indexer, prompt = sys.argv[1:]
    config = {"indexer": indexer, "device_tokens": 6400, "host_memory_gb": 0.5, "min_context": 512, "debug": True}
    engine = sgl.Engine(
        model_path=model,
        lsa_config=config,
        skip_server_warmup=True,
        disable_radix_cache=True,
        chunked_prefill_size=1024,
    )
    def ask(**lsa):
        params = {"temperature": 0, "max_new_tokens": 80, "ignore_eos": True, "custom_params": {"lsa": lsa}}
        return engine.generate(prompt, params)["text"]
    answers = {"indexer": ask(), "full": ask(enabled=False), "quest": ask(policy="quest")}
    state = engine.get_server_info()["internal_states"][0]["lsa"]
    print("RESULT " + json.dumps({"answers": answers, "state": state}))
    engine.shutdown()
"""


def test_engine_takes_a_config(model_path: str, tmp_path: pathlib.Path) -> None:
    """With the shipped indexer, chunked prefill and no radix tree: the whole path runs, and reading everything is not
    affected by it."""
    script = tmp_path / "engine.py"
    script.write_text(textwrap.dedent(ENGINE))
    prompt = needle(1800, 0.5, 6).prompt
    done = subprocess.run(
        [sys.executable, str(script), model_path, "smollm2-135m-instruct", prompt],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line, done.stderr[-3000:]
    result = json.loads(line.removeprefix("RESULT "))
    finished = [r for r in result["state"]["finished"] if r["context_pages"] > 20]
    assert [r["policy"] for r in finished] == ["indexer", "full", "quest"]
    assert finished[0]["resident_pages"] < finished[0]["context_pages"] == finished[1]["resident_pages"]
    assert result["state"]["fallbacks"] == 0
    assert all(needle(1800, 0.5, 6).answer in result["answers"][how] for how in ("full", "indexer"))
    assert 0 < finished[0]["coverage"] <= 1
    assert finished[1]["coverage"] is finished[2]["coverage"] is None
    assert finished[0]["history"] != finished[2]["history"]


def test_refused_at_start(model_path: str, tmp_path: pathlib.Path) -> None:
    """The process ends before it loads a model; the other refusals are tested without a server."""
    flags = ["--model-path", model_path, "--lsa-host-memory-gb", "100000"]
    with ServerProcess("sglang_lsa.launch_server", flags, tmp_path / "refused.log") as server:
        with pytest.raises(ServerFailed):
            server.wait_until_ready()
        log = server.log.read_text()
        assert "--lsa-host-memory-gb 100000" in log and "GB are free: lower it" in log
        assert "Load weight" not in log
