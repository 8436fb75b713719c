"""``sglang-lsa bench prefill``: time to the first token of prompts larger than the pool, and over long memories."""

from __future__ import annotations

import asyncio
import pathlib
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sglang_lsa.bench import report
from sglang_lsa.bench.client import run_together
from sglang_lsa.bench.serving import READY_SECONDS, SYSTEMS, gpu_name
from sglang_lsa.bench.shapes import SHAPES, Shape
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.mirror import GB, require_host_memory
from sglang_lsa.provenance import commit
from sglang_lsa.server_process import ServerProcess

CHUNK = 8192
PROMPT = 131_072
LONG_PROMPT = 400_000
MEMORY, QUESTION = 262_144, 1024
"""Tokens of a memory that the radix tree has, and of a question about it."""
FILLER = 16_384
"""Tokens of the prompts that push a memory off the device."""
KEY = ("model", "system", "pool_tokens", "workload", "context", "prefill", "device")
"""What identifies a row: a later measurement of the same replaces it."""


@dataclass(frozen=True)
class Group:
    """What one server measures.

    Attributes:
        name: for ``--pools``.
        systems: ``stock``, ``lsa``, or both, one after the other.
        pool_tokens: of KV on the device.
        prompts: lengths of prompts whose prefill is timed.
        questions: whether questions about a long memory are, too.
    """

    name: str
    systems: tuple[str, ...]
    pool_tokens: int
    prompts: tuple[int, ...]
    questions: bool = False

    @property
    def host_tokens(self) -> int:
        """What the mirror must hold: the longest prompt, or the memory and what pushes it off the device."""
        memory = (MEMORY + 4 * QUESTION + self.pool_tokens + FILLER) if self.questions else 0
        return max(*self.prompts, memory, self.pool_tokens) + 64 * PAGE_SIZE


GROUPS = (
    Group("full", ("stock", "lsa"), 140_032, (PROMPT,)),
    Group("quarter", ("lsa",), PROMPT // 4, (PROMPT,)),
    Group("16gb", ("lsa",), 131_072, (LONG_PROMPT,), questions=True),
)
"""For the 8B shape, of which 131,072 tokens of KV take 16 GB."""


def run(
    output: pathlib.Path,
    console: Console,
    *,
    pools: Sequence[str],
    workloads: Sequence[str],
    repeats: int,
    server_args: str,
    command: str,
) -> list[dict[str, Any]]:
    """Measure; every row is written at once, so that nothing is lost.

    Returns:
        The new rows.

    Raises:
        RuntimeError: there is no GPU, or a server or a request failed.
        ValueError: the machine has too little host memory.
    """
    shape = SHAPES["8b"]
    facts = {"gpu": gpu_name(), "commit": commit(), "command": command}
    groups = [group for group in GROUPS if group.name in pools and (group.questions or "ttft" in workloads)]
    for group in groups:
        if "lsa" in group.systems:
            require_host_memory(group.host_tokens * shape.token_bytes, f"the pool {group.name}", "choose other --pools")
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for group in groups:
        for system in group.systems:
            for row in measure(group, shape, system, workloads, repeats, server_args, output, console):
                rows.append(row | facts)
                report.write(output, rows, "prefill", KEY, plot)
    console.print(table(report.read(output, "prefill")))
    return rows


def measure(
    group: Group,
    shape: Shape,
    system: str,
    workloads: Sequence[str],
    repeats: int,
    server_args: str,
    output: pathlib.Path,
    console: Console,
) -> Iterator[dict[str, Any]]:
    """Start one server and measure the group's prompts and questions on it."""
    context = max(*group.prompts, MEMORY + QUESTION if group.questions else 0) + 1024
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model-path", str(shape.write(pathlib.Path(folder) / shape.name, context))]
        flags += ["--load-format", "dummy", "--skip-tokenizer-init", "--skip-server-warmup"]
        flags += ["--attention-backend", "flashinfer", "--page-size", str(PAGE_SIZE), "--max-running-requests", "2"]
        flags += ["--cuda-graph-backend-prefill", "disabled", "--cuda-graph-max-bs-decode", "2"]
        flags += ["--context-length", str(context), "--chunked-prefill-size", str(CHUNK)]
        if system == "stock":
            flags += ["--max-total-tokens", str(group.pool_tokens)]
        else:
            host_gb = round(group.host_tokens * shape.token_bytes / GB + 0.1, 1)
            flags += ["--lsa-device-tokens", str(group.pool_tokens), "--lsa-host-memory-gb", str(host_gb)]
        began = time.perf_counter()
        log = output / f"{system}-{group.name}.log"
        with ServerProcess(SYSTEMS[system], [*flags, *shlex.split(server_args)], log) as server:
            server.wait_until_ready(READY_SECONDS)
            console.print(f"{system} {group.name}: up after {time.perf_counter() - began:.0f} s")
            bench = Measurement(server, group, shape, system, console)
            bench.first_token(bench.text(2 * CHUNK, 0))  # compiles what is compiled at first use
            for tokens in group.prompts if "ttft" in workloads else ():
                count = repeats if tokens <= PROMPT else 1
                yield bench.row("ttft", tokens, [partial(bench.new_prompt, tokens, number) for number in range(count)])
            if group.questions and "question" in workloads:
                yield from bench.questions(repeats)


class Measurement:
    """Times first tokens on one server."""

    def __init__(self, server: ServerProcess, group: Group, shape: Shape, system: str, console: Console):
        self.server, self.group, self.shape, self.system, self.console = server, group, shape, system, console

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

    def questions(self, repeats: int) -> Iterator[dict[str, Any]]:
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

        for device in ("cold", "warm"):
            for prefill in ("exact", "resident"):
                runs = [ask(prefill, device == "cold")] * repeats
                yield self.row("question", MEMORY + QUESTION, runs, prefill, device)

    def row(
        self,
        workload: str,
        context: int,
        runs: Sequence[Callable[[], float]],
        prefill: str | None = None,
        device: str | None = None,
    ) -> dict[str, Any]:
        """One row of the results."""
        before = self._status()
        seconds = [run() for run in runs]
        after = self._status()
        row: dict[str, Any] = {
            "model": self.shape.name,
            "system": self.system,
            "pool_tokens": self.group.pool_tokens,
            "kv_pool_bytes": self.group.pool_tokens * self.shape.token_bytes,
            "workload": workload,
            "context": context,
            "prefill": prefill,
            "device": device,
            "ttft_s": statistics.median(seconds),
            "ttft_all_s": [round(value, 4) for value in seconds],
            "gpu_used_bytes": gpu_used_bytes(),
        }
        if self.system == "lsa":
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
        return self.server.get("/lsa/status") if self.system == "lsa" else {}


def gpu_used_bytes() -> int:
    """Memory in use on the first GPU, by everything on it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20


def compared(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float | None]]:
    """Every row with its ratio: prompts to stock's time for the same prompt, questions to the exact answer's."""
    stock = {row["context"]: row["ttft_s"] for row in rows if row["system"] == "stock" and row["workload"] == "ttft"}
    exact = {
        (row["pool_tokens"], row["context"], row["device"]): row["ttft_s"]
        for row in rows
        if row["workload"] == "question" and row["prefill"] == "exact"
    }
    found: list[tuple[dict[str, Any], float | None]] = []
    for row in rows:
        if row["workload"] == "question":
            base = exact.get((row["pool_tokens"], row["context"], row["device"]))
            found.append((row, base / row["ttft_s"] if base and row["prefill"] == "resident" else None))
        else:
            base = stock.get(row["context"])
            found.append((row, row["ttft_s"] / base if base and row["system"] == "lsa" else None))
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """What a reader wants first."""
    shown = Table(title="time to first token")
    for name in ("model", "system", "KV pool", "what", "tokens", "prefill", "device"):
        shown.add_column(name)
    for name in ("TTFT s", "ratio", "streamed GB", "recalled GB", "staging MB"):
        shown.add_column(name, justify="right")
    for row, ratio in compared(rows):
        against = "" if ratio is None else f"{ratio:.2f}x " + ("faster" if row["workload"] == "question" else "stock")
        shown.add_row(
            row["model"],
            row["system"],
            f"{row['kv_pool_bytes'] / GB:.1f} GB",
            row["workload"],
            f"{row['context']:,}",
            row["prefill"] or "",
            row["device"] or "",
            f"{row['ttft_s']:.3f}",
            against,
            *(f"{row[name] / unit:.1f}" if name in row else "-" for name, unit in _COLUMNS),
        )
    return shown


_COLUMNS = (("streamed_bytes", GB), ("recalled_bytes", GB), ("staging_bytes", 1 << 20))


def plot(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Bars: prefill of one prompt over pools, and questions about a memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    titles = {"ttft": "a new prompt", "question": f"a question of {QUESTION:,} tokens about {MEMORY:,} cached ones"}
    for axis, (workload, title) in zip(axes, titles.items(), strict=True):
        mine = [(row, ratio) for row, ratio in compared(rows) if row["workload"] == workload]
        names = [
            f"{row['system']}, {row['kv_pool_bytes'] / GB:.0f} GB\n{row['context']:,}"
            if workload == "ttft"
            else f"{row['prefill']}\n{row['device']}"
            for row, _ in mine
        ]
        bars = axis.bar(range(len(mine)), [row["ttft_s"] for row, _ in mine])
        axis.bar_label(
            bars,
            [f"{row['ttft_s']:.2f} s" + (f"\n{ratio:.2f}x" if ratio else "") for row, ratio in mine],
            fontsize=8,
        )
        axis.set_xticks(range(len(mine)), names)
        axis.set(title=title, ylabel="seconds to the first token")
        axis.margins(y=0.2)
    figure.suptitle(f"{rows[0]['gpu']}, {rows[0]['model'].upper()} shape, dummy weights" if rows else "")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
