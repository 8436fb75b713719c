"""What ``sglang-lsa doctor`` reports in tests, and servers that it is asked about.

Importing SGLang takes most of the time, so one process (this file, run as a script) runs all commands that need it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
import sys
from typing import Any

from sglang_lsa.cli import main
from sglang_lsa.config import LSAConfig
from sglang_lsa.doctor.contexts import Fit, fit
from sglang_lsa.doctor.machine import GB
from sglang_lsa.doctor.server import DeviceMemory, HostMemory, Server
from sglang_lsa.doctor.weights import Weights
from sglang_lsa.engine.sizing import MemoryPlan
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.memory.layout.base import PageShape

EIGHT_B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
}
SLIDING = {**EIGHT_B, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 4096}
NAMES_ONE = {**EIGHT_B, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096}
"""A window that SGLang's model ignores."""

COMMANDS: dict[str, list[str]] = {
    # the model's folder is added, and --json
    "80 GB": ["8b", "--gpu-memory-gb", "80", "--free-host-memory-gb", "200", "--context-tokens", "32768", "131072"],
    "indexer": ["", "--gpu-memory-gb", "24", "--free-host-memory-gb", "9", "--lsa-indexer", "smollm2-135m-instruct"],
    "12 GB": ["8b", "--gpu-memory-gb", "12"],
    "sliding window": ["sliding", "--gpu-memory-gb", "80"],
    "names a window": ["names one", "--gpu-memory-gb", "80", "--free-host-memory-gb", "200"],
    "two ranks": ["8b", "--gpu-memory-gb", "80", "--free-host-memory-gb", "200", "--tp-size", "2"],
    "flags": ["", "--tp-size", "2", "--page-size", "32"],
    "no such model": ["missing"],
    "too large a mirror": ["", "--lsa-host-memory-gb", "1000000"],
    "too small a mirror": ["", "--lsa-host-memory-gb", "0.05", "--lsa-device-tokens", "9600"],
    "context longer than the mirror": [
        *("", "--lsa-host-memory-gb", "0.1", "--lsa-device-tokens", "1024", "--context-tokens", "2048", "8192"),
    ],
    "context longer than the model": ["", "--lsa-host-memory-gb", "1", "--context-tokens", "9000"],
    "a cpu too small": ["", "--free-host-memory-gb", "1", "--lsa-host-memory-gb", "0.9"],
}


def probe(folder: pathlib.Path) -> dict[str, Any]:
    """Run all commands in this process."""
    from sglang_lsa.embedded_model import embedded_model_path

    paths = {name: folder / name for name in ("8b", "sliding", "names one", "missing")}
    for name, values in (("8b", EIGHT_B), ("sliding", SLIDING), ("names one", NAMES_ONE)):
        paths[name].mkdir()
        (paths[name] / "config.json").write_text(json.dumps(values))
    found = {}
    for name, (model, *flags) in COMMANDS.items():
        path = paths[model] if model else embedded_model_path()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = main(["doctor", "--model-path", str(path), *flags, "--json"])
        found[name] = {"status": status, **json.loads(out.getvalue())}
    return found


def contexts(
    tokens: int,
    physical: int = 1000,
    virtual: int = 100_000,
    chunk: int | None = 2048,
    requests: int = 10_000,
    overhead: int = 0,
    on_gpu: bool = True,
    expectations: dict[str, Expectation] | None = None,
    **options: Any,
) -> Fit:
    """With KV of one byte a token, and a mirror that is never the limit unless ``virtual`` says so."""
    plan = MemoryPlan(physical * 64, virtual * 64, PageShape(64, ((64,),)), {"staging": overhead})
    config = LSAConfig(**{"budget": 0.1, "floor_tokens": 0, "min_context": 1024, **options})
    return fit(
        config,
        plan,
        tokens,
        context_tokens=131_072,
        chunk_tokens=chunk,
        max_requests=requests,
        on_gpu=on_gpu,
        expectations=expectations,
    )


def cpu_server(virtual: int = 64 * 1000, **changed: Any) -> Server:
    server = Server(
        name="a model",
        device="cpu",
        config=LSAConfig(),
        memory=DeviceMemory(20 * GB, 10 * GB, "measured"),
        host=HostMemory(10 * GB, "measured"),
        weights=Weights(GB, "measured", "headers of 1 safetensors file"),
        static_share=0.8,
        budgeted_bytes=7 * GB,
        budgeted_tokens=300_032,
        plan=MemoryPlan(64 * 64, virtual, PageShape(64, ((64 * 23040,),)), {"page_keys": 1000}),
        context_tokens=8192,
        table_tokens=8196,
        chunk_tokens=2048,
        max_requests=256,
        dtype="bfloat16",
    )
    return dataclasses.replace(server, **changed)


if __name__ == "__main__":
    results = pathlib.Path(sys.argv[1])
    (results / "found.json").write_text(json.dumps(probe(results)))
