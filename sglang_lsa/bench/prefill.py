"""``sglang-lsa bench prefill``: time to the first token of prompts larger than the pool, and over long memories."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import shlex
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from sglang_lsa.bench import servers
from sglang_lsa.bench.client import run_together
from sglang_lsa.bench.prefill_groups import (
    CHUNK,
    DEVICES,
    FILLER,
    MEMORY,
    PROMPT,
    QUESTION,
    READINGS,
    Group,
    groups,
)
from sglang_lsa.bench.prefill_report import PREFILL, table
from sglang_lsa.bench.server_args import log_path, same_words
from sglang_lsa.bench.servers import DUMMY, gpu_name, ready
from sglang_lsa.bench.shapes import SHAPES, Shape
from sglang_lsa.bench.systems import SYSTEMS, Failures, Row, System, kv_name
from sglang_lsa.memory.mirror import GB, require_host_memory
from sglang_lsa.provenance import commit
from sglang_lsa.server_process import ServerProcess


def run(
    output: pathlib.Path,
    console: Console,
    *,
    pools: Sequence[str],
    prompts: Sequence[int],
    workloads: Sequence[str],
    systems: Sequence[str],
    repeats: int,
    kv_dtype: str,
    resume: bool,
    server_args: str,
    command: str,
) -> list[Row]:
    """Measure; every row is written at once, so that nothing is lost.

    Args:
        server_args: more arguments of all servers, as one would type them.

    Returns:
        The new rows.

    Raises:
        RuntimeError: there is no GPU, or a server or a request failed; the other systems have been measured.
        ValueError: the machine has too little host memory, or a quotation mark of ``server_args`` has no other.
    """
    shape = SHAPES["8b"]
    typed = same_words(server_args)
    facts = {"gpu": gpu_name(), "commit": commit(), "command": command, "server_args": typed}
    asked = groups(pools, prompts, workloads, kv_dtype)
    if any(SYSTEMS[name].lsa for name in systems):
        for group in asked:
            wanted = group.host_tokens * shape.token_bytes(kv_dtype)
            require_host_memory(wanted, f"the pool {group.name}", "choose other --pools or --prompts")
    output.mkdir(parents=True, exist_ok=True)
    done = PREFILL.measured(output, resume)
    failures = Failures(console.print)
    rows: list[Row] = []
    with PREFILL.drawn(output):
        for group in asked:
            for name in systems:
                system = SYSTEMS[name]
                left = remaining(group.of_system(system), shape, system, facts, done)
                if not left.prompts and not left.questions:
                    continue
                measured = measure(left, shape, system, repeats, typed, output, console)
                for row in failures.go_on(system.name, group.name, measured):
                    rows.append(row | facts)
                    PREFILL.keep(output, [rows[-1]])
    console.print(table(PREFILL.read(output)))
    failures.finish()
    return rows


def remaining(group: Group, shape: Shape, system: System, facts: Row, done: set[tuple[str, ...]]) -> Group:
    """What of the group no row is there for; questions are measured together."""

    def there(*what: Any) -> bool:
        row = labels(group, shape, system, *what) | facts
        return PREFILL.identity(row | {"kv_dtype": kv_name(group.kv_dtype)}) in done

    prompts = tuple(tokens for tokens in group.prompts if not there("ttft", tokens, None, None))
    questions = [("question", MEMORY + QUESTION, prefill, device) for device in DEVICES for prefill in READINGS]
    return dataclasses.replace(
        group, prompts=prompts, questions=group.questions and not all(there(*what) for what in questions)
    )


def labels(
    group: Group, shape: Shape, system: System, workload: str, context: int, prefill: str | None, device: str | None
) -> Row:
    """The columns of a row that say what is measured."""
    return {
        "model": shape.name,
        "system": system.name,
        "pool": group.name,
        "pool_tokens": group.pool_tokens,
        "workload": workload,
        "context": context,
        "prefill": prefill,
        "device": device,
    }


def arguments(group: Group, shape: Shape, system: System, model: pathlib.Path) -> list[str]:
    """Of the server that measures the group."""
    flags = ["--model-path", str(model), *DUMMY]
    flags += ["--cuda-graph-max-bs-decode", "2", "--max-running-requests", "2"]
    flags += ["--context-length", str(group.context), "--chunked-prefill-size", str(CHUNK)]
    host_gb = round(group.host_tokens * shape.token_bytes(group.kv_dtype) / GB + 0.1, 1)
    return system.arguments(flags, group.kv_dtype, group.pool_tokens, host_gb)


def measure(
    group: Group,
    shape: Shape,
    system: System,
    repeats: int,
    server_args: str,
    output: pathlib.Path,
    console: Console,
) -> Iterator[Row]:
    """Start one server and measure the group's prompts and questions on it."""

    def flags(model: pathlib.Path) -> list[str]:
        return [*arguments(group, shape, system, model), *shlex.split(server_args)]

    names = (system.name, group.name, str(group.pool_tokens), group.kv_dtype)
    log = log_path(output, names, group.prompts, group.questions, repeats, server_args)
    with ExitStack() as stack:
        server = servers.begin(system, shape, group.context, flags, log, stack)
        facts = ready(server, f"{system.name} {group.name}", console)
        bench = Measurement(server, group, shape, system, facts, console)
        bench.first_token(bench.text(2 * CHUNK, 0))  # compiles what is compiled at first use
        for tokens in group.prompts:
            count = repeats if tokens <= PROMPT else 1
            yield bench.row("ttft", tokens, [partial(bench.new_prompt, tokens, number) for number in range(count)])
        if group.questions:
            yield from bench.questions(repeats)


class Measurement:
    """Times first tokens on one server."""

    def __init__(self, server: ServerProcess, group: Group, shape: Shape, system: System, facts: Row, console: Console):
        self.server, self.group, self.shape, self.system = server, group, shape, system
        self.facts, self.console = facts, console

    def text(self, tokens: int, seed: int) -> list[int]:
        """Random token ids, the same in every run."""
        return np.random.default_rng(seed).integers(10, self.shape.vocabulary, tokens).tolist()

    def first_token(self, prompt: list[int], prefill: str | None = None) -> float:
        """Seconds until the first token of an answer of two."""
        options = {"lsa": {"prefill": prefill}} if prefill else None
        (stream,) = asyncio.run(run_together(self.server.url, [prompt], 2, options))
        return stream.times[0] - stream.sent

    def new_prompt(self, tokens: int, number: int) -> float:
        """A prompt of which the radix tree has nothing."""
        self.flush()
        return self.first_token(self.text(tokens, 1 + number))

    def flush(self) -> None:
        self.server.post("/flush_cache?timeout=60", {}, parse=False)

    def questions(self, repeats: int) -> Iterator[Row]:
        """Questions about a cached memory, read exactly or by a resident set; with the device as the question before
        left it (warm), and after other prompts used all of the pool (cold)."""
        self.flush()
        memory = self.text(MEMORY, 100)
        self.console.print(f"  memory of {MEMORY} tokens: {self.first_token(memory):.1f} s")
        asked = 0

        def ask(prefill: str, cold: bool) -> Callable[[], float]:
            def once() -> float:
                nonlocal asked
                asked += 1
                if cold:
                    for part in range(-(-self.group.pool_tokens // FILLER)):
                        self.first_token(self.text(FILLER, 200 + part))
                return self.first_token([*memory, *self.text(QUESTION, 1000 + asked)], prefill)

            return once

        for device in DEVICES:
            for prefill in READINGS:
                runs = [ask(prefill, device == "cold")] * repeats
                yield self.row("question", MEMORY + QUESTION, runs, prefill, device)

    def row(
        self,
        workload: str,
        context: int,
        runs: Sequence[Callable[[], float]],
        prefill: str | None = None,
        device: str | None = None,
    ) -> Row:
        """One row of the results."""
        before = self._status()
        seconds = [run() for run in runs]
        after = self._status()
        row = labels(self.group, self.shape, self.system, workload, context, prefill, device) | self.facts
        row |= {
            "kv_pool_bytes": self.group.pool_tokens * self.shape.token_bytes(self.group.kv_dtype),
            "ttft_s": statistics.median(seconds),
            "ttft_all_s": [round(value, 4) for value in seconds],
            "gpu_used_bytes": gpu_used_bytes(),
        }
        if self.system.lsa:
            row |= {
                "streamed_bytes": after["prefill"]["streamed_bytes"] - before["prefill"]["streamed_bytes"],
                "recalled_bytes": after["recalls"]["bytes"] - before["recalls"]["bytes"],
                "staging_bytes": after["physical"]["overhead_bytes"]["staging"],
                "overhead_bytes": sum(after["physical"]["overhead_bytes"].values()),
                "host_bytes": after["host"]["mirror_bytes"],
            }
        self.console.print(
            f"  {workload} {context} {prefill or ''} {device or ''}: {row['ttft_s']:.3f} s {row['ttft_all_s']}, "
            f"streamed {row.get('streamed_bytes', 0) / GB:.1f} GB, recalled {row.get('recalled_bytes', 0) / GB:.1f} GB"
        )
        return row

    def _status(self) -> dict[str, Any]:
        return self.server.get("/lsa/status") if self.system.lsa else {}


def gpu_used_bytes() -> int:
    """Memory in use on the first GPU, by everything on it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20
