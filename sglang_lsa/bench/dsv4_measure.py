"""What ``sglang-lsa bench dsv4`` measures: one server, the prefixes that are forged in it, and requests over them."""

from __future__ import annotations

import asyncio
import pathlib
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from sglang_lsa.bench import dsv4_plugin
from sglang_lsa.bench.client import run_together
from sglang_lsa.bench.dsv4_arms import MOST, Dsv4Arm, Dsv4System, Plan, plan
from sglang_lsa.bench.dsv4_shapes import ENVIRONMENT, Dsv4Shape
from sglang_lsa.bench.plateau import Plateau, plateau
from sglang_lsa.bench.server_args import log_path
from sglang_lsa.bench.servers import READY_SECONDS
from sglang_lsa.bench.systems import Row
from sglang_lsa.memory.layout.dsv4 import PAGE_TOKENS
from sglang_lsa.server_process import ServerProcess
from sglang_lsa.streaming import Stream

CHUNK = 4096
SKIPPED = 16
"""Tokens of the last request that count as warm-up."""


@dataclass(frozen=True)
class Asked:
    """What is the same for all rows of a run.

    Attributes:
        weights: ``bfloat16`` or ``fp8``.
        kv_gb: GB (10^9) on the device for KV of every kind.
        tokens: that each request generates.
        share: requests over each prefix.
        budget: of LSA.
        churns: share of a resident set that every window replaces; each is measured.
        server_args: more arguments of all servers, as one would type them. Rows with others are other rows.
    """

    shape: Dsv4Shape
    weights: str
    kv_gb: float
    tokens: int
    share: int
    budget: float
    churns: tuple[float, ...]
    server_args: str = ""

    @property
    def kv_bytes(self) -> int:
        return int(self.kv_gb * 1e9)


def labels(asked: Asked, arm: Dsv4Arm, system: Dsv4System, churn: float | None) -> Row:
    """The columns of a row that say what is measured."""
    return {
        "model": asked.shape.name,
        "weights": asked.weights,
        "arm": arm.name,
        "context": arm.context,
        "kv_gb": asked.kv_gb,
        "share": 1 if arm.requests else asked.share,
        "system": system.name,
        "budget": asked.budget if system.lsa else None,
        "churn": churn,
        "server_args": asked.server_args,
    }


def arguments(asked: Asked, arm: Dsv4Arm, system: Dsv4System, planned: Plan, model: pathlib.Path) -> list[str]:
    """Of the server that measures the arm."""
    room = arm.context + asked.tokens + 2 * CHUNK
    flags = ["--model-path", str(model), "--load-format", "dummy", "--skip-tokenizer-init", "--skip-server-warmup"]
    flags += ["--context-length", str(room), "--page-size", str(PAGE_TOKENS), "--chunked-prefill-size", str(CHUNK)]
    flags += ["--max-running-requests", str(planned.requests), "--cuda-graph-max-bs-decode", str(planned.requests)]
    flags += ["--cuda-graph-backend-prefill", "disabled", "--sampling-backend", "pytorch", "--grammar-backend", "none"]
    flags += ["--random-seed", "1", "--stream-interval", "1" if planned.requests == 1 else "4"]
    flags += ["--mem-fraction-static", "0.92"]
    if planned.window_ratio is not None:
        flags += ["--swa-full-tokens-ratio", f"{planned.window_ratio:.5f}"]
    if system.lsa:
        flags += ["--lsa-budget", f"{asked.budget:g}", "--lsa-host-memory-gb", f"{planned.host_gb:g}"]
    return [*flags, *shlex.split(asked.server_args)]


def measure(
    asked: Asked,
    system: Dsv4System,
    arm: Dsv4Arm,
    rows: Sequence[tuple[Dsv4Arm, float | None]],
    output: pathlib.Path,
    console: Console,
) -> Iterator[Row]:
    """Start one server, forge its prefixes and send requests over them, once for each arm and churn.

    Args:
        arm: the server is for.
        rows: arms of the same context, and churns.
    """
    planned = plan(
        arm,
        system,
        asked.shape,
        kv_bytes=asked.kv_bytes,
        tokens=asked.tokens,
        share=asked.share,
        budget=asked.budget,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        model = asked.shape.write(folder / asked.shape.name, asked.weights)
        plugin = folder / "plugin"
        environment = {**ENVIRONMENT, **dsv4_plugin.install(plugin, asked.kv_bytes)}
        flags = arguments(asked, arm, system, planned, model)
        log = log_path(
            output, (system.name, asked.shape.name, arm.name), asked, [(one.name, churn) for one, churn in rows]
        )
        began = time.perf_counter()
        with ServerProcess(system.module, flags, log, environment) as server:
            server.wait_until_ready(READY_SECONDS)
            console.print(f"{system.name} {arm.name}: up after {time.perf_counter() - began:.0f} s, {planned}")
            bench = Measurement(server, plugin, asked, arm, system, planned)
            bench.warm_up()
            console.print(f"  {bench.forge()}")
            for each, churn in rows:
                row = bench.row(each, churn)
                console.print(
                    f"  {each.name}, churn {churn}: {row['running_requests']} running over "
                    f"{row['distinct_prefixes']} prefixes, {row['decode_tokens_per_s']:.0f} tokens/s, "
                    f"TPOT {row['tpot_ms_p50']:.2f} ms, "
                    f"recall {row['recall_bytes_per_s'] / 1e9:.2f} GB/s, TTFT {row['ttft_s']:.1f} s, "
                    f"{time.perf_counter() - began:.0f} s so far"
                )
                yield row


class Measurement:
    """Requests over forged prefixes on one server."""

    def __init__(
        self,
        server: ServerProcess,
        plugin: pathlib.Path,
        asked: Asked,
        arm: Dsv4Arm,
        system: Dsv4System,
        planned: Plan,
    ):
        self.server, self.plugin, self.asked = server, plugin, asked
        self.arm, self.system, self.planned = arm, system, planned
        self.share = 1 if arm.requests else asked.share
        self.forged = 0
        self.pools: dict[str, int] = {}

    def warm_up(self) -> None:
        """Compile what is compiled at first use, then forget it."""
        for length in (100, 2 * CHUNK + 100):
            prompt = np.random.default_rng(7).integers(10, self.asked.shape.vocabulary, length).tolist()
            parameters = {"max_new_tokens": 72, "ignore_eos": True, "temperature": 0}
            self.server.post("/generate", {"input_ids": prompt, "sampling_params": parameters})
        self.server.post("/flush_cache?timeout=60", {}, parse=False)

    def forge(self) -> dict[str, Any]:
        """Fill the KV with prefixes, and read one of them.

        Raises:
            RuntimeError: there is room for none.
        """
        spare = self.share * self.arm.own_pages(self.asked.tokens)
        what = {
            "forge": self.arm.name,
            "context": self.arm.context,
            "most": self.planned.distinct,
            "vocabulary": self.asked.shape.vocabulary,
            "spare": spare,
        }
        found: dict[str, Any] = self.ask(what)
        self.forged, self.pools = found["forged"], found["pools"]
        if not self.forged:
            raise RuntimeError(f"the server has no room for one prefix of {self.arm.context:,} tokens")
        prompt = self.arm.prompt(MOST, self.forged, self.asked.shape.vocabulary)
        asyncio.run(run_together(self.server.url, [prompt], 72))  # compiles what is compiled for long contexts
        return found

    def ask(self, what: dict[str, Any]) -> Any:
        return dsv4_plugin.ask(self.plugin, what, lambda: self.server.process.poll() is None)

    def row(self, arm: Dsv4Arm, churn: float | None) -> Row:
        """One row of the results.

        Args:
            arm: of the same context as the one whose prefixes were forged.
        """
        if self.system.lsa:
            self.ask({"churn": churn})
        requests = arm.requests or self.forged * self.share
        vocabulary, distinct = self.asked.shape.vocabulary, min(self.forged, requests)
        prompts = [arm.prompt(number, distinct, vocabulary) for number in range(requests)]
        before = self.status()
        streams = asyncio.run(run_together(self.server.url, prompts, self.asked.tokens))
        figures, after = plateau(streams, skip_tokens=SKIPPED), self.status()
        missed = [cached for s in streams if s.tokens and (cached := s.cached or 0) < arm.context]
        if missed:
            raise RuntimeError(
                f"{len(missed)} of {requests} requests found {missed[0]} tokens of their prefix, not "
                f"{arm.context}: what they computed in its place was measured with the rest"
            )
        row = labels(self.asked, arm, self.system, churn) | self.figures(figures, streams, requests, distinct)
        row |= self.memory(before, after, distinct)
        return row | {"recall_bytes_per_s": row["recalled_bytes"] / row["decoded_s"]}

    def status(self) -> dict[str, Any]:
        return self.server.get("/lsa/status") if self.system.lsa else {}

    def figures(self, found: Plateau, streams: Sequence[Stream], requests: int, distinct: int) -> Row:
        times = [time for stream in streams for time in stream.times]
        return {
            "requests": requests,
            "distinct_prefixes": distinct,
            "running_requests": found.running,
            "decode_tokens_per_s": found.tokens_per_s,
            "tpot_ms_p50": found.percentile(50),
            "tpot_ms_p99": found.percentile(99),
            "ttft_s": found.ttft_s,
            "decoded_s": max(times) - min(times),
        }

    def memory(self, before: dict[str, Any], after: dict[str, Any], distinct: int) -> Row:
        """Bytes of every pool, what was recalled, and how much of the KV that grows is on the GPU."""
        shape = self.asked.shape
        row: Row = {f"{name}_bytes": size for name, size in self.pools.items()}
        row |= {"window_ratio": self.planned.window_ratio, "recalled_bytes": 0, "host_bytes": 0, "stalls": 0}
        row |= {"lsa_overhead_bytes": 0, "gpu_share": 1.0, "gpu_share_nominal": 1.0}
        if self.system.lsa:
            overhead = after["physical"]["overhead_bytes"]
            held, context = most_held(before, after), distinct * self.arm.pages
            kept = None if held is None else min(1.0, held / context)

            def grown(name: str) -> int:
                return int(after["recalls"][name] - before["recalls"][name])

            row |= {
                "recalled_bytes": grown("prefetched_pages") * after["page_bytes"],
                "host_bytes": after["host"]["mirror_bytes"],
                "stalls": after["stalls"] - before["stalls"],
                "late_pages": grown("late_pages"),
                "graphless_steps": after["graphless_steps"] - before["graphless_steps"],
                "retractions": after["pressure"]["retractions"] - before["pressure"]["retractions"],
                "lsa_overhead_bytes": sum(size for name, size in overhead.items() if name not in self.pools),
                "gpu_share": None if kept is None else shape.share(kept),
                "gpu_share_nominal": None if kept is None else shape.nominal_share(kept),
            }
        return row | {"kv_bytes": sum(self.pools.values()) + row["lsa_overhead_bytes"]}


def most_held(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Device pages that requests held while as many decoded as ever between the two statuses; None if none was seen."""
    for running in sorted(map(int, after["decoding"]), reverse=True):
        now, then = after["decoding"][str(running)], before["decoding"].get(str(running), {})
        samples, pages = (now[name] - then.get(name, 0) for name in ("samples", "held_pages"))
        if samples:
            return float(pages / samples)
    return None
