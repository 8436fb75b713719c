"""``sgl.Engine(lsa_config=...)``, and refusals at start. SGLang's own launcher serves the fixture ``small``."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from prompts import needle
from safetensors.torch import save_file

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
    """With a randomly initialised indexer, chunked prefill and no radix tree: the whole path runs, and reading
    everything is not affected by it."""
    indexer = random_indexer(tmp_path / "indexer", hidden_size=576, num_hidden_layers=30)
    script = tmp_path / "engine.py"
    script.write_text(textwrap.dedent(ENGINE))
    prompt = needle(1800, 0.5, 6).prompt
    done = subprocess.run(
        [sys.executable, str(script), model_path, str(indexer), prompt],
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
    assert needle(1800, 0.5, 6).answer in result["answers"]["full"]
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


def random_indexer(folder: pathlib.Path, hidden_size: int, num_hidden_layers: int) -> pathlib.Path:
    """A checkpoint with random weights, as ``sglang-lsa train`` would lay it out."""
    from sglang_lsa.indexer.checkpoint import IndexerConfig
    from sglang_lsa.indexer.model import MemoryIndexer

    config = IndexerConfig(hidden_size, num_hidden_layers, layers=(10, 20), rank=16, heads=2, head_dim=32)
    torch.manual_seed(0)
    folder.mkdir()
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(MemoryIndexer(config).state_dict(), folder / "model.safetensors")
    return folder
