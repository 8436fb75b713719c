"""Two GPUs: what ``tests/server/test_tensor_parallel.py`` asks of two ranks on a CPU, over NCCL, with CUDA graphs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rank_bodies as ranks
import torch
from families import ask, random_prompt
from gpu_servers import AS_LSA_ATTENDS, STOCK
from serving import assert_idle
from tensor_parallel import GPUS

from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def path(folder: pathlib.Path) -> str:
    return GPUS.model(folder / "llama", "llama")


@pytest.fixture(scope="module")
def plain(folder: pathlib.Path, path: str) -> Iterator[ServerProcess]:
    with ranks.small(GPUS, LSA, path, folder / "plain.log") as server:
        yield server


@pytest.fixture(scope="module")
def late(folder: pathlib.Path, path: str) -> Iterator[ServerProcess]:
    """Every copy of rank 1 begins 10 ms late."""
    with ranks.small(GPUS, ranks.FAULTS, path, folder / "late.log") as server:
        yield server


@pytest.mark.parametrize("family", ["llama", "qwen2.5"])
def test_with_all_pages_they_say_what_stock_says(family: str, folder: pathlib.Path) -> None:
    path = GPUS.model(folder / f"{family}-exact", family)
    expected = ranks.stock_answers(GPUS, path, folder / f"stock-{family}.log")
    with ranks.small(GPUS, LSA, path, folder / f"{family}.log") as server:
        ranks.all_pages_are_what_stock_says(server, expected)


@pytest.mark.parametrize("name", ["plain", "late"])
def test_dense_requests_are_retracted_together(name: str, request: pytest.FixtureRequest) -> None:
    ranks.dense_requests_are_retracted_together(request.getfixturevalue(name), GPUS)


def test_sets_are_read_from_the_token_on_that_they_name(late: ServerProcess, plain: ServerProcess) -> None:
    ranks.sets_are_read_from_the_token_on_that_they_name(late, plain)


@pytest.mark.parametrize("name", ["plain", "late"])
def test_under_pressure_their_records_stay_the_same(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.records_stay_the_same_under_pressure(request.getfixturevalue(name), GPUS, 500, monkeypatch, None)


@pytest.mark.parametrize("when", ["oomfirst", "oomlast"])
def test_memory_that_runs_out_on_one_rank(late: ServerProcess, when: str) -> None:
    ranks.memory_runs_out_on_one_rank(late, when, GPUS)


SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""Llama 3.1 8B and Qwen3 30B-A3B, with SGLang's dummy weights."""
COMMON_SHAPE = {
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPE_FLAGS = ["--tp-size", "2", "--load-format", "dummy", "--skip-tokenizer-init", "--skip-server-warmup"]
SHAPE_FLAGS += ["--max-running-requests", "4", "--cuda-graph-max-bs-decode", "4", "--context-length", "65536"]
# Multicast over NVLink, which this would use for models of experts, is not to be had on every machine.
SHAPE_FLAGS += ["--enforce-disable-flashinfer-allreduce-fusion"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_people_serve_say_what_stock_says(shape: str, folder: pathlib.Path, extra: list[str]) -> None:
    """With CUDA graphs, at a budget of 1. Dummy weights attend to everything alike, so that a smaller budget moves
    probabilities by little: that it moves them at all shows what equality is worth."""
    path = folder / shape
    path.mkdir()
    (path / "config.json").write_text(json.dumps(COMMON_SHAPE | SHAPES[shape]))
    flags = ["--model-path", str(path), *SHAPE_FLAGS, *extra]
    stock_flags = [*AS_LSA_ATTENDS, "--page-size", "64", "--cuda-graph-backend-prefill", "disabled"]
    with (
        ServerProcess(STOCK, [*flags, *stock_flags, "--max-total-tokens", "49152"], folder / f"{shape}-s.log") as stock,
        ServerProcess(
            LSA,
            [*flags, "--lsa-device-tokens", "49152", "--lsa-host-memory-gb", "8", "--lsa-debug"],
            folder / f"{shape}-l.log",
        ) as lsa,
    ):
        for server in (stock, lsa):
            server.wait_until_ready(GPUS.seconds)
        moved = False
        print()
        for tokens in (600, 9000, 33_000):
            prompt = random_prompt(tokens, tokens)
            expected, again = (ask(stock, prompt, 96) for _ in range(2))
            whole, pruned = ask(lsa, prompt, 96, budget=1.0), ask(lsa, prompt, 96, budget=0.05)
            apart = [np.abs(expected.chances - other.chances).max() for other in (again, whole, pruned)]
            same = [expected.tokens == other.tokens for other in (again, whole, pruned)]
            print(f"{shape}, {tokens} tokens: stock again, all pages, 5 %: apart {apart}, tokens equal {same}")
            assert whole.tokens == expected.tokens
            moved = moved or apart[2] > 0
        assert moved
        assert_idle(lsa)
        assert lsa.get("/lsa/status")["ranks"]["checks"] > 0
