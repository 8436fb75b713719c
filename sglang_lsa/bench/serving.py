"""``sglang-lsa bench serving``: stock SGLang against LSA; see ``--help`` for what is measured."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import pathlib
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from sglang_lsa.bench.client import run_together
from sglang_lsa.bench.plateau import Plateau, plateau
from sglang_lsa.bench.shapes import SHAPES, Shape
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.mirror import GB, available_host_memory
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.provenance import commit
from sglang_lsa.server_process import LSA, ServerProcess

STOCK = "sglang.launch_server"
SYSTEMS = {"stock": STOCK, "lsa": LSA}
CONTEXT = 270_000
READY_SECONDS = 600
HOST_SPARE_GB = 12
"""Host memory that is left for the server itself."""


@dataclass(frozen=True)
class Arm:
    """One measurement: ``batch`` prompts of ``context`` tokens sent at once, each asked for ``tokens``."""

    workload: str
    context: int
    batch: int
    tokens: int
    shared: int = 0
    """Tokens at the start that all prompts have in common."""

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Random token ids; the same in every run.

        Single prompts and shared prefixes are the beginnings of one long text: the radix tree of either system has
        what an earlier arm prefilled, which saves most of the time that a run takes.
        """
        text = np.random.default_rng(0).integers(10, vocabulary, CONTEXT)
        if self.batch == 1:
            return [text[: self.context].tolist()]
        draw = np.random.default_rng((1, self.context, self.batch))
        own = draw.integers(10, vocabulary, (self.batch, self.context - self.shared))
        return [np.concatenate((text[: self.shared], part)).tolist() for part in own]


@dataclass(frozen=True)
class Group:
    """What one server measures: a model with a KV pool of ``pool_gb``."""

    model: str
    pool_gb: float
    arms: tuple[Arm, ...]

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def pool_tokens(self) -> int:
        return int(self.pool_gb * GB) // self.shape.token_bytes // PAGE_SIZE * PAGE_SIZE

    def host_gb(self) -> float:
        """Mirror for the largest arm, as far as this machine has memory.

        Raises:
            ValueError: it has too little for a mirror of the pool.
        """
        tokens = max(arm.shared + arm.batch * (arm.context - arm.shared + arm.tokens + PAGE_SIZE) for arm in self.arms)
        least = (self.pool_tokens + 2 * PAGE_SIZE) * self.shape.token_bytes / GB
        wanted = max((tokens + CONTEXT // 8) * self.shape.token_bytes / GB, least)
        free = available_host_memory() / GB - HOST_SPARE_GB
        if free < least:
            raise ValueError(
                f"the {self.model} benchmark with {self.pool_gb:g} GB of KV needs {least + HOST_SPARE_GB:.0f} GB "
                f"of host memory, {free + HOST_SPARE_GB:.0f} GB are free: free some, or choose other --models or "
                "--workloads"
            )
        return math.ceil(min(wanted, free) * 100) / 100


def tpot(*sizes: tuple[int, int]) -> tuple[Arm, ...]:
    return tuple(Arm("tpot", context, batch, 400) for batch, context in sizes)


SINGLE = tpot((1, 1024), (1, 32_768), (1, 131_072), (1, 256_000))
SHARED = Arm("shared", 131_072 + 1024, 32, 240, shared=131_072)
GROUPS = (
    Group("8b", 48, (*SINGLE, SHARED, *tpot((8, 40_000), (16, 16_000)))),
    Group("8b", 32, (Arm("iso", 60_000, 13, 640),)),
    Group("1b", 8, (*SINGLE, Arm("iso", 60_000, 26, 800))),
)
"""Pools are in GB of KV; iso arms send more prompts than either system runs at once."""


def run(
    output: pathlib.Path,
    console: Console,
    *,
    models: Sequence[str],
    workloads: Sequence[str],
    systems: Sequence[str],
    policies: Sequence[str],
    server_args: str,
    command: str,
) -> list[dict[str, Any]]:
    """Measure everything that was asked for; every row is written at once, so that nothing is lost.

    Returns:
        The new rows.

    Raises:
        RuntimeError: there is no GPU, or a server or a request failed.
        ValueError: the machine has too little memory, or nothing could be measured.
    """
    from sglang_lsa.bench import report

    facts = {"gpu": gpu_name(), "commit": commit(), "command": command}
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for group in GROUPS:
        arms = tuple(arm for arm in group.arms if arm.workload in workloads)
        if group.model not in models or not arms:
            continue
        group = dataclasses.replace(group, arms=arms)
        for system in systems:
            for row in measure(group, system, policies, server_args, output, console):
                rows.append(row | facts)
                report.write(output, rows)
    console.print(report.table(report.read(output)))
    return rows


def measure(
    group: Group, system: str, policies: Sequence[str], server_args: str, output: pathlib.Path, console: Console
) -> Iterator[dict[str, Any]]:
    """Start one server and run the group's arms on it, with LSA once per policy."""
    largest = max(arm.batch for arm in group.arms)
    with tempfile.TemporaryDirectory() as folder:
        model = group.shape.write(pathlib.Path(folder) / group.model, CONTEXT)
        flags = ["--model-path", str(model), "--load-format", "dummy", "--skip-tokenizer-init"]
        flags += ["--attention-backend", "flashinfer", "--page-size", str(PAGE_SIZE)]
        flags += ["--cuda-graph-backend-prefill", "disabled", "--cuda-graph-max-bs-decode", str(largest)]
        flags += ["--max-running-requests", str(largest), "--context-length", str(CONTEXT)]
        flags += ["--stream-interval", "1" if largest == 1 else "4", "--skip-server-warmup"]
        if system == "stock":
            flags += ["--max-total-tokens", str(group.pool_tokens)]
        else:
            flags += ["--lsa-device-tokens", str(group.pool_tokens), "--lsa-host-memory-gb", str(group.host_gb())]
        log = output / f"{system}-{group.model}-{group.pool_gb:g}.log"
        began = time.perf_counter()
        with ServerProcess(SYSTEMS[system], [*flags, *shlex.split(server_args)], log) as server:
            server.wait_until_ready(READY_SECONDS)
            console.print(f"{system} {group.model}: up after {time.perf_counter() - began:.0f} s")
            warm_up(server, group)
            for arm in group.arms:
                for policy in policies if system == "lsa" else [""]:
                    row = run_arm(server, group, arm, system, policy)
                    console.print(
                        f"  {arm.workload} {arm.batch} x {arm.context} {policy}: {row['running_requests']} running, "
                        f"{row['decode_tokens_per_s']:.0f} tokens/s, TPOT {row['tpot_ms_p50']:.2f} ms, "
                        f"TTFT {row['ttft_s']:.1f} s"
                    )
                    yield row


def warm_up(server: ServerProcess, group: Group) -> None:
    """Compile what is compiled at first use."""
    for length in (100, 9000):
        prompt = np.random.default_rng(2).integers(10, group.shape.vocabulary, length).tolist()
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 150, "ignore_eos": True, "temperature": 0}}
        server.post("/generate", body)


def run_arm(server: ServerProcess, group: Group, arm: Arm, system: str, policy: str) -> dict[str, Any]:
    """One row of the results."""
    parameters = {"lsa": {"policy": policy}} if policy else None
    prompts = arm.prompts(group.shape.vocabulary)
    if arm.shared:  # the agents' common memory is there before they come
        asyncio.run(run_together(server.url, [prompts[0][: arm.shared]], 2, parameters))
    before = server.get("/lsa/status") if system == "lsa" else {}
    streams = asyncio.run(run_together(server.url, prompts, arm.tokens, parameters))
    figures = plateau(streams, skip_tokens=16)
    after = server.get("/lsa/status") if system == "lsa" else {}
    decode = max(len(stream.tokens) and stream.tokens[-1] for stream in streams)
    row = {
        "workload": arm.workload,
        "model": group.model,
        "system": system,
        "policy": policy or None,
        "context": arm.context,
        "batch": arm.batch,
        "running_requests": figures.running,
        "decode_tokens_per_s": figures.tokens_per_s,
        "tpot_ms_p50": figures.percentile(50),
        "tpot_ms_p99": figures.percentile(99),
        "ttft_s": figures.ttft_s,
        "cached_tokens": int(np.median([stream.cached or 0 for stream in streams if stream.tokens])),
        "kv_pool_bytes": group.pool_tokens * group.shape.token_bytes,
        "kv_gpu_bytes": stock_kv_bytes(group, arm, figures.running, decode),
        "lsa_overhead_gpu_bytes": 0,
        "host_bytes": 0,
    }
    return row | (lsa_figures(before, after, figures) if system == "lsa" else {})


def stock_kv_bytes(group: Group, arm: Arm, running: int, decoded: int) -> int:
    """KV bytes of all pages of the running requests, a shared prefix counted once."""
    own = pages_spanned(arm.context - arm.shared + decoded) * running
    return (own + pages_spanned(arm.shared)) * PAGE_SIZE * group.shape.token_bytes


def lsa_figures(before: dict, after: dict, figures: Plateau) -> dict[str, Any]:
    """What the server's status says about one arm."""
    pages = after["recalls"]["pages"] - before["recalls"]["pages"]
    seconds = after["recalls"]["seconds"] - before["recalls"]["seconds"]
    prefetched, late = (after["recalls"][n] - before["recalls"][n] for n in ("prefetched_pages", "late_pages"))
    busy = {name: after[name] - before[name] for name in ("refresh_host_seconds", "refresh_device_seconds")}
    refreshes = after["refreshes"] - before["refreshes"]
    each = {name: seconds / max(1, refreshes) for name, seconds in busy.items()}
    windows = figures.tokens / after["window"]  # every request is refreshed once a window
    return {
        "kv_gpu_bytes": held_bytes(before, after),
        "lsa_overhead_gpu_bytes": sum(after["physical"]["overhead_bytes"].values()),
        "host_bytes": after["host"]["mirror_bytes"],
        "recalled_bytes": pages * after["page_bytes"],
        "recall_gbps": pages * after["page_bytes"] / seconds / 1e9 if seconds else None,
        "prefetched_bytes": prefetched * after["page_bytes"],
        "recall_hidden_fraction": 1 - late / prefetched if prefetched else None,
        "refreshes": refreshes,
        "refresh_fraction": sum(each.values()) * windows / figures.seconds,
        "refresh_device_fraction": each["refresh_device_seconds"] * windows / figures.seconds,
        "refresh_host_ms": 1000 * each["refresh_host_seconds"],
        "refresh_device_ms": 1000 * each["refresh_device_seconds"],
        "stalls": after["stalls"] - before["stalls"],
    }


def held_bytes(before: dict, after: dict) -> int | None:
    """Device KV that the requests needed while as many decoded as ever did between the two statuses: the mean of the
    server's own samples; None where it took none. Nothing is asked while the arm runs: stock is not asked either."""
    for running in sorted(map(int, after["decoding"]), reverse=True):
        now, then = after["decoding"][str(running)], before["decoding"].get(str(running), {})
        samples, pages = (now[name] - then.get(name, 0) for name in ("samples", "held_pages"))
        if samples:
            return round(pages * after["page_bytes"] / samples)
    return None


def gpu_name() -> str:
    """The GPU that is measured.

    Raises:
        RuntimeError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("sglang-lsa bench serving needs an NVIDIA GPU: torch sees none on this machine")
    return torch.cuda.get_device_name()
