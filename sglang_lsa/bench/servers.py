"""Servers of a benchmark: a model shape with dummy weights, begun, waited for and warmed up."""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
from rich.console import Console

from sglang_lsa.bench.shapes import Shape
from sglang_lsa.bench.systems import Row, System, server_facts
from sglang_lsa.server_process import STOCK, ServerProcess

READY_SECONDS = 600
DUMMY = ("--load-format", "dummy", "--skip-tokenizer-init", "--skip-server-warmup")
"""Flags of every server: token ids in, token ids out."""


def begin(
    system: System,
    shape: Shape,
    context: int,
    arguments: Callable[[pathlib.Path], list[str]],
    log: pathlib.Path,
    stack: ExitStack,
) -> ServerProcess:
    """Start a server; it runs as long as the stack at most.

    Args:
        context: tokens that the model's configuration allows.
        arguments: all flags, given the model's folder.
    """
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    model = shape.write(pathlib.Path(folder) / shape.name, context)
    return stack.enter_context(ServerProcess(module_of(system), arguments(model), log))


def module_of(system: System) -> str:
    """What ``python -m`` runs. Without a GPU SGLang's own launcher does not start stock: ours for CPUs does."""
    import torch

    return system.module if system.lsa or torch.cuda.is_available() else STOCK


def ready(server: ServerProcess, what: str, console: Console) -> Row:
    """Wait for it; what it says about how it attends."""
    began = time.perf_counter()
    server.wait_until_ready(READY_SECONDS)
    facts = server_facts(server.get("/server_info"))
    console.print(f"{what}: up after {time.perf_counter() - began:.0f} s, {facts}; its log: {server.log.name}")
    return facts


def warm_up(server: ServerProcess, vocabulary: int, lengths: tuple[int, ...] = (100, 9000)) -> None:
    """Compile what is compiled at first use, with prompts of these lengths."""
    for length in lengths:
        prompt = np.random.default_rng(2).integers(10, vocabulary, length).tolist()
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 150, "ignore_eos": True, "temperature": 0}}
        server.post("/generate", body)


def gpu_name(benchmark: str = "serving") -> str:
    """The GPU that is measured.

    Raises:
        RuntimeError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"sglang-lsa bench {benchmark} needs an NVIDIA GPU: torch sees none on this machine")
    return torch.cuda.get_device_name()
