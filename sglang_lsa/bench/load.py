"""``sglang-lsa bench load``: stock SGLang and LSA while requests arrive by themselves; see ``--help``."""

from __future__ import annotations

import asyncio
import pathlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from rich.console import Console

from sglang_lsa.bench import servers
from sglang_lsa.bench.client import run_together
from sglang_lsa.bench.load_client import LOADS, Load, offer
from sglang_lsa.bench.load_figures import Objective, completed_within, figures
from sglang_lsa.bench.load_mix import MIXES, SMALLER, Mix
from sglang_lsa.bench.load_plan import SEARCHED, Plan
from sglang_lsa.bench.load_report import LOAD, table
from sglang_lsa.bench.load_saturation import saturation
from sglang_lsa.bench.server_args import log_path, same_words
from sglang_lsa.bench.servers import gpu_name, ready, warm_up
from sglang_lsa.bench.serving_arms import Group
from sglang_lsa.bench.systems import SYSTEMS, Failures, Row, System
from sglang_lsa.memory.mirror import GB
from sglang_lsa.provenance import commit, hardware
from sglang_lsa.server_process import ServerProcess
from sglang_lsa.streaming import RequestFailed

POOLS = {"8b": 16.0, "1b": 4.0, "tiny": 0.02}
"""GB of KV on the device, by model, unless ``--pool-gb`` says otherwise."""
IDLE_SECONDS = 300


def run(
    output: pathlib.Path,
    console: Console,
    *,
    models: Sequence[str],
    mixes: Sequence[str],
    systems: Sequence[str],
    rates: Sequence[float],
    times: Sequence[float],
    seconds: float,
    pool_gb: float | None,
    memories: int,
    max_running: int,
    objective: Objective,
    kv_dtype: str,
    resume: bool,
    server_args: str,
    command: str,
) -> list[Row]:
    """Measure everything that was asked for; every row is written at once, so that nothing is lost.

    Args:
        rates: requests a second; none: search stock's saturation, and measure ``times`` that.
        seconds: during which requests arrive, at each rate.
        pool_gb: of KV on the device, of all systems; None: the model's own.
        server_args: more arguments of all servers, as one would type them.

    Returns:
        The new rows.

    Raises:
        RuntimeError: there is no GPU, or a server failed; the other systems have been measured.
        ValueError: the machine has too little memory, no request arrives at a rate, or a quotation mark of
            ``server_args`` has no other.
    """
    typed = same_words(server_args)
    facts: Row = {"commit": commit(), "command": command}
    done = frozenset(LOAD.measured(output, resume))
    plans = []
    for model in models:
        smaller = SMALLER.get(model, 1)
        chosen = tuple(MIXES[name].with_memories(memories).smaller(smaller) for name in mixes)
        gpu = hardware() if smaller > 1 else gpu_name("load")
        group = Group(model, POOLS[model] if pool_gb is None else pool_gb, (), kv_dtype, max_running)
        asked = tuple(SYSTEMS[name] for name in systems)
        plan = Plan(group, chosen, asked, tuple(rates), tuple(times), seconds, objective, gpu, typed, done)
        check(plan, console)
        plans.append(plan)
    output.mkdir(parents=True, exist_ok=True)
    failures = Failures(console.print)
    rows: list[Row] = []
    with LOAD.drawn(output):
        for plan in plans:
            if resume:
                plan.remember(LOAD.read(output))
            for system, left in plan.turns():
                measured = measure(plan, system, left, output, console)
                for row in failures.go_on(system.name, plan.group.model, measured):
                    rows.append(row | facts)
                    LOAD.keep(output, [rows[-1]])
    console.print(table(LOAD.read(output)))
    failures.finish()
    return rows


def check(plan: Plan, console: Console) -> None:
    """
    Raises:
        ValueError: see :func:`run`.
    """
    for mix in plan.mixes:
        for rate in plan.rates:
            mix.requests(rate, plan.seconds, plan.vocabulary)
        if mix.longest > plan.group.pool_tokens:
            console.print(
                f"a pool of {plan.group.pool_gb:g} GB holds {plan.group.pool_tokens:,} tokens: stock refuses the "
                f"longest prompts of {mix.name}, of {mix.longest:,} with their answers"
            )
    if any(system.lsa for system in plan.systems):
        wanted, there = plan.mirror_tokens() * plan.group.token_bytes / GB, plan.mirror_gb()
        if there < wanted:
            console.print(f"host memory for a mirror of {there:.0f} GB; LSA would use {wanted:.0f} GB")


def measure(plan: Plan, system: System, mixes: Sequence[Mix], output: pathlib.Path, console: Console) -> Iterator[Row]:
    """Start one server, search its saturation where that is to be known, and measure what is left of these mixes.

    Raises:
        RuntimeError: a server failed, or the rates depend on a saturation that was not found.
    """
    for mix in mixes:
        if plan.unknown(mix) and system != SEARCHED:
            raise RuntimeError(f"the saturation of {SEARCHED.name} with {mix.name} was not found: give --rates")
    model = plan.group.model

    def flags(folder: pathlib.Path) -> list[str]:
        return plan.arguments(system, folder)

    log = log_of(plan, system, mixes, output)
    with ExitStack() as stack:
        server = servers.begin(system, plan.group.shape, plan.context, flags, log, stack)
        facts = ready(server, f"{system.name} {model}", console)
        warm_up(server, plan.vocabulary, tuple(min(length, plan.context // 2) for length in (100, 9000)))
        for mix in mixes:
            bench = Measurement(plan, system, mix, server, console)
            bench.prefill_memories()
            if plan.unknown(mix):
                plan.saturations[mix.name] = bench.search()
            for rate in plan.left(system, mix):
                yield bench.row(rate) | facts


def log_of(plan: Plan, system: System, mixes: Sequence[Mix], output: pathlib.Path) -> pathlib.Path:
    """Where the log goes of a server that measures these mixes."""
    names = ("load", system.name, plan.group.model, f"{plan.group.pool_gb:g}", plan.group.kv_dtype)
    asked = (plan.mixes, plan.group.room, plan.rates, plan.times, plan.seconds, plan.objective, plan.server_args)
    return log_path(output, (*names, "+".join(mix.name for mix in mixes)), *asked)


class Measurement:
    """One mix on one server."""

    def __init__(self, plan: Plan, system: System, mix: Mix, server: ServerProcess, console: Console):
        self.plan, self.system, self.mix, self.server, self.console = plan, system, mix, server, console
        self.memories: list[np.ndarray] = mix.memory_texts(plan.vocabulary)

    def prefill_memories(self) -> None:
        """One after the other. What the server has no room for it forgets, or refuses."""
        began, refused = time.perf_counter(), 0
        for memory in self.memories:
            try:
                asyncio.run(run_together(self.server.url, [memory.tolist()], 1))
            except RequestFailed:
                refused += 1
        if self.memories:
            self.console.print(
                f"  {len(self.memories)} memories of {sum(map(len, self.memories)):,} tokens: "
                f"{time.perf_counter() - began:.0f} s, {refused} refused"
            )

    def offer(self, rate: float, patience: float, turn: int) -> Load:
        """Requests at this rate; the server is idle before and after them.

        Raises:
            RuntimeError: no request arrives, the server ended, or does not come to rest.
        """
        try:
            requests = self.mix.requests(rate, self.plan.seconds, self.plan.vocabulary, turn)
        except ValueError as error:  # of a rate that was found
            raise RuntimeError(f"{self.mix.name}: {error}") from error
        load = asyncio.run(offer(self.server.url, requests, self.memories, self.plan.seconds, patience))
        if self.server.process.poll() is not None:
            raise RuntimeError(f"the server ended at {rate:g} requests/s:\n{self.server.log_tail()}")
        self.server.post("/abort_request", {"rid": "", "abort_all": True}, parse=False)
        self.wait_until_idle()
        return load

    def wait_until_idle(self) -> None:
        deadline, still = time.monotonic() + IDLE_SECONDS, 0
        while still < 2:  # the first answer may be as old as the last pass
            ranks: list[dict[str, Any]] = self.server.get(LOADS)["loads"]
            busy = sum(rank["num_running_reqs"] + rank["num_waiting_reqs"] for rank in ranks)
            still = 0 if busy else still + 1
            if time.monotonic() > deadline:
                raise RuntimeError(f"{busy} requests still run {IDLE_SECONDS} s after all were aborted")
            time.sleep(0.25)

    def search(self) -> float:
        """Requests a second that the server completes when more arrive.

        Raises:
            RuntimeError: it was not found.
        """
        seconds = self.plan.seconds

        def probe(rate: float) -> tuple[float, float]:
            """Completions are counted once as many run as can."""
            load = self.offer(rate, 0.0, turn=1)
            completed = completed_within(load, seconds / 3, seconds) / (seconds * 2 / 3)
            self.console.print(f"  {self.mix.name} at {rate:g} requests/s: {completed:.3g}/s completed")
            return len(load.sent) / seconds, completed

        try:
            found = saturation(probe, self.mix.start)
        except ValueError as error:
            raise RuntimeError(f"{self.mix.name}: {error}") from error
        self.console.print(f"  {self.mix.name}: {self.system.name} is saturated at {found:g} requests/s")
        return found

    def row(self, rate: float) -> Row:
        """One row of the results."""
        before = self.status()
        load = self.offer(rate, self.plan.objective.patience(self.mix.answer[1]), turn=0)
        row = self.plan.labels(self.system, self.mix, rate) | figures(load, self.plan.objective)
        row |= {"kv_pool_bytes": self.plan.group.pool_tokens * self.plan.group.token_bytes}
        row |= lsa_figures(before, self.status()) if self.system.lsa else {}
        first = row["ttft_s_p99"]
        self.console.print(
            f"  {self.mix.name} at {rate:g} requests/s: {row['met_objective']} of {row['requests']} met the objective, "
            f"{row['output_tokens_per_s']:.0f} tokens/s, TTFT p99 {'-' if first is None else f'{first:.2f} s'}"
        )
        for reason in sorted({sent.refused for sent in load.sent if sent.refused})[:3]:
            self.console.print(f"    refused: {reason[:200]}")
        return row

    def status(self) -> dict[str, Any]:
        return self.server.get("/lsa/status") if self.system.lsa else {}


def lsa_figures(before: dict[str, Any], after: dict[str, Any]) -> Row:
    """What the server's status says about one run; one rank."""
    return {
        "recalled_bytes": after["recalls"]["bytes"] - before["recalls"]["bytes"],
        "streamed_bytes": after["prefill"]["streamed_bytes"] - before["prefill"]["streamed_bytes"],
        "stalls": after["stalls"] - before["stalls"],
        "host_bytes": after["host"]["mirror_bytes"],
    }
