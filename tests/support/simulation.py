"""The whole runtime under a simulated SGLang and a simulated GPU, both driven by a seed: every read is checked when it
runs.

    python tests/support/simulation.py --seeds 2000 [--first 0] [--jobs 2] [--steps 150] [--page 64] [--own-index]
                                        [--groups] [--auto] [--paced]

What is real: the runtime with ledger, pager, lookahead, admission and prefill. What is a model: SGLang's loop with one
result of delay (``simulated_scheduler``), its radix tree and allocator (``simulated_cache``), the passes of a model
(``simulated_work``), and the streams of a GPU (``simulated_gpu``).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import logging
import multiprocessing
import random
import sys
import time
import traceback
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from promises import owed
from simulated_gpu import LAYERS, SimulatedGPU
from simulated_index import INDEX, CheckedNative, Observed
from simulated_index import layout as index_layout
from simulated_scheduler import Scheduler
from simulated_work import Req

from sglang_lsa.config import AUTO, LSAConfig
from sglang_lsa.engine.groups import GroupRules
from sglang_lsa.engine.policies import Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.engine.window import Clock
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.ranks import Ranks
from sglang_lsa.memory.scores import Reduction
from sglang_lsa.patches.requests import judge

ROWS = 8
"""Requests that run at the same time."""
CHANGES: tuple[tuple[str, list[Any]], ...] = (
    ("policy", ["full", "quest", "recency"]),
    ("budget", [0.05, 0.3]),
    ("prefill", ["resident", "exact"]),
    ("dense_steps", [0, 9]),
    ("threshold", [None, 0.5]),
)
"""What an administrator changes while the server runs."""
SIZED_CHANGES: tuple[tuple[str, list[Any]], ...] = (
    ("budget", [0.05, 0.3, AUTO, AUTO]),
    ("target_coverage", [0.2, 0.9]),
    ("max_budget", [0.1, 0.8]),
    ("prefill", ["resident", "exact"]),
)
"""The same where sets are as large as they need to be."""
FEW = Expectation(((0.0, 0.0, 0.0), (1.0, 1.0, 0.03)), "nothing")
"""Promises far less than sets take whose scores are flat."""
SURGE = 24
"""Passes after which all requests need other sets: many pages for as many passes, then few."""
INSTEAD = {"quest": "native", "resident": "exact"}
"""What a model with an index of its own is asked for."""
IDLE_STEPS = 200
"""Steps in which nothing runs although requests wait, before that counts as stuck."""


class Scores(Policy):
    """Random scores; sometimes none, sometimes no numbers, sometimes an error."""

    queries = True
    across_ranks = Reduction.MAX

    def __init__(self, chance: random.Random):
        self.chance = chance

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        numbers = np.random.default_rng(self.chance.randrange(1 << 30))
        scores = numbers.random(len(pages))
        scores[numbers.random(len(pages)) < 0.3] = 0.0
        what = self.chance.random()
        if what < 0.02:
            raise RuntimeError("injected: no scores")
        if what < 0.05:
            scores[:] = np.nan
        elif what < 0.08:
            scores[::2] = -np.inf
        return scores


class Sized(Scores):
    """Random shares: of nearly all pages the same for some passes, of one page nearly all for the next ones."""

    across_ranks = Reduction.SUM
    calibrated = True
    expectation = FEW

    def __init__(self, chance: random.Random, clock: Clock):
        super().__init__(chance)
        self.clock = clock

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        flat = self.clock.step // SURGE % 2
        return super().score(request, pages) ** (0.01 if flat else 40.0)


class Simulation:
    """One server from its start until everything that was asked is answered.

    Args:
        page: tokens of a page.
        own_index: the model shows no keys and has an index of its own, as DeepSeek-V4; its pages have 256 tokens.
        ranks: of which this is one. The world tells all of them the same; what its heads score is its own, and so is
            when its GPU comes to what is queued.
        groups: requests over one prefix read pages together, wherever that saves anything; in every other seed their
            sets are chosen with a view to that.
        auto: sets are as large as they need to be, which is far more than was promised, of all requests at once.
        paced: prompts wait for decode steps, also between their chunks.
    """

    def __init__(
        self,
        seed: int,
        resident: float = 0.4,
        page: int = 64,
        scheduler: type[Scheduler] = Scheduler,
        layout: type[MhaLayout] | None = None,
        own_index: bool = False,
        ranks: Ranks | None = None,
        groups: bool = False,
        auto: bool = False,
        paced: bool = False,
    ):
        self.seed, self.chance, self.page = seed, random.Random(seed), page
        chance = self.chance
        own = random.Random(f"{seed} on rank {ranks.rank}") if ranks else chance
        physical, virtual = chance.choice([16, 24, 40]), chance.choice([120, 250])
        self.chunk: int = chance.choice([2, 4, 8]) * self.page
        self.resident = 0.0 if own_index else resident
        self.config = {
            "budget": chance.choice([0.1, 0.2, 0.5]),
            "min_pages": chance.choice([1, 4]),
            "floor_tokens": 0,
            "min_context": chance.choice([4, 8]) * self.page,
            "window": 8,
            "prefetch_steps": 3,
            "recent_pages": chance.choice([1, 4]),
            "prompt_pages": chance.choice([0, 2]),
            "staging_pages": 3,
            "dense_steps": chance.choice([0, 0, 5]),
            "cache_outputs": chance.random() < 0.2,
            "prompt_lookup": 0,
            "prefill_tokens_per_step": (self.page // 4, 2 * self.page)[seed % 2] if paced else 0,
            "prefill_burst_tokens": (0, 10 * self.page)[seed // 2 % 2],
            "groups": groups,
            "group_margin": 0.95 if groups and seed % 2 else 0.0,
        }
        self.own_index = own_index
        self.native: CheckedNative | None = None
        if own_index:
            self.config["policy"] = "native"
        self.pager = Pager(self._layout(physical, layout or MhaLayout), virtual, ranks=ranks)
        self.req_to_token = torch.zeros((ROWS + 1, virtual * self.page), dtype=torch.int32)
        config = LSAConfig(**self.config)
        index = INDEX if own_index else None
        self.runtime = LSARuntime(config, self.pager, self.req_to_token, 1, 1.0, self.chunk, index=index)
        if self.runtime.groups is not None:
            self.runtime.groups.rules = GroupRules(least_saved=1e-9)
        self.gpu = SimulatedGPU(self.pager, own)
        self.overlap = chance.random() < 0.7
        lookahead = self.runtime.lookahead
        lookahead.clock.lag, lookahead.clock.lead = chance.choice([(2, 3), (2, 3), (0, 0)]) if self.overlap else (0, 0)
        policies = dict(lookahead.scorer.policies)
        if own_index:
            policies["native"] = self.native = CheckedNative(policies["native"], self.gpu)
        else:
            policies["quest"] = Scores(own)
        self.auto = auto
        if auto:
            policies["indexer"] = Sized(own, lookahead.clock)
            lookahead.rules.expectations = {"indexer": FEW}
            lookahead.rules.thresholds = {"indexer": 0.0}
            sized = {"budget": AUTO, "target_coverage": 0.9, "max_budget": chance.choice([0.3, 0.8])}
            in_force = dataclasses.replace(lookahead.rules.config, policy="indexer", indexer="simulated", **sized)
            lookahead.rules.config = in_force
            self.config |= sized
        lookahead.scorer.policies = policies
        self.scheduler = scheduler(self.runtime, self.gpu, chance, self.chunk, self.overlap)
        self.scheduler.memory.watch = Observed(self.runtime, self.gpu) if own_index else None
        self.arrivals = 40
        self.arrived = self.step_number = 0
        self.counts = self.scheduler.counts

    def _layout(self, physical: int, kind: type[MhaLayout]) -> KVLayout:
        if self.own_index:
            return index_layout(physical)
        keys, values = (
            [torch.zeros(((physical + 1) * self.page, 1, 1), dtype=torch.float64) for _ in range(LAYERS)]
            for _ in range(2)
        )
        return kind(keys, values, self.page)

    def __str__(self) -> str:
        sizes = f"{self.pager.ledger.physical_pages} device pages, {self.pager.ledger.virtual_pages} host pages"
        timing = f"lag {self.runtime.lookahead.clock.lag}, overlap {self.overlap}, chunks of {self.chunk // self.page}"
        return f"seed {self.seed}, pages of {self.page}, at step {self.step_number}: {sizes}, {timing}, {self.config}"

    def run(self, steps: int = 150) -> None:
        """``steps`` rounds of the scheduler with new requests, then as many as it takes without.

        Raises:
            AssertionError, or what the runtime raises: something is wrong.
        """
        for _ in range(steps):
            self.step()
        self.arrivals = idle = 0
        while self.scheduler.busy:
            idle = 0 if self.step() else idle + 1
            waiting = [req.rid for req in self.scheduler.waiting]
            assert idle < IDLE_STEPS, f"stuck: {waiting} wait, promised: {owed(self.pager)}"
        self.pager.settle()
        self.runtime.on_idle()
        self.check()
        assert not self.runtime.requests and not self.runtime.admission.admitted, "requests are left"
        assert not owed(self.pager) and not self.pager.ledger.held_pages, "pages are left"
        assert self.runtime.failed_batches == self.runtime.integrity_failures == 0
        self.pager.reset()
        lookahead, ledger = self.runtime.lookahead, self.pager.ledger
        self.counts.update(
            recalled=ledger.recalls,
            evicted=ledger.evictions,
            stalls=lookahead.counts.stalls,
            shrunk=lookahead.counts.shrunk,
            failures=lookahead.counts.failures,
        )
        if self.native is not None:
            assert lookahead.counts.fallbacks == 0, "a policy failed"
            self.counts["scored"] = self.native.looked

    def step(self) -> bool:
        """One round: what the world does, then what the scheduler does. Returns whether a batch ran."""
        self.step_number += 1
        self._surroundings()
        ran = self.scheduler.step()
        if self.chance.random() < 0.3:
            self.check()
        return ran

    def check(self) -> None:
        """What must hold between two rounds."""
        self.runtime.check()
        assert self.pager.unpromised_later >= 0, f"more is promised than can be had: {owed(self.pager)}"
        assert self.native is None or not self.native.wrong, self.native.wrong[0]

    # -- what clients and administrators do ----------------------------------------------------------------------

    def _surroundings(self) -> None:
        chance, scheduler = self.chance, self.scheduler
        if chance.random() < 0.25 and len(scheduler.waiting) < 6 and self.arrivals:
            self.arrivals -= 1
            self._arrive()
        if chance.random() < 0.02 and scheduler.running:
            chance.choice(scheduler.running).aborted = True
        if chance.random() < 0.02 and scheduler.waiting:
            # SGLang drops an aborted request from its queue without a word to the cache.
            scheduler.waiting.pop(chance.randrange(len(scheduler.waiting)))
            self.counts["aborted in the queue"] += 1
        if chance.random() < 0.03 and scheduler.chunked is not None:
            scheduler.abort_chunked()
            self.counts["aborted in a prompt"] += 1
        if chance.random() < 0.02:
            name, values = chance.choice(SIZED_CHANGES if self.auto else CHANGES)
            value = chance.choice(values)
            self.runtime.reconfigure({name: INSTEAD.get(value, value) if self.own_index else value})
            self.counts["reconfigured"] += 1

    def _arrive(self) -> None:
        chance = self.chance
        self.arrived += 1
        document = chance.randrange(3)
        shared = chance.choice([0, 3, 10, 13, 20, 30]) * self.page
        own = chance.randrange(1, 6 * self.page)
        if chance.random() < 0.1:  # one that fills the device pool, and grows
            own = max(1, (self.pager.ledger.physical_pages - 2) * self.page - shared)
        prompt = np.concatenate((1 + document * 1e6 + np.arange(shared), 1e9 + self.arrived * 1e6 + np.arange(own)))[
            : self.pager.ledger.virtual_pages // 3 * self.page
        ]
        rid = f"r{self.arrived}"
        alive = self.scheduler.alive
        if alive and chance.random() < 0.1:
            rid = chance.choice(alive).rid  # its client hung up and asks again
            self.counts["rid again"] += 1
        params = SimpleNamespace(custom_params=self._options(), max_new_tokens=chance.choice([1, 5, 40, 150, 300]))
        req = Req(rid, self.arrived, self.page, prompt, params, chance.randrange(2), prompt.astype(np.int64).tolist())
        if self.native is not None:
            self.native.reqs.append(req)
        if (reason := judge(self.runtime.admission, req)) is not None:
            # SGLang computes one token of a request that it aborts.
            assert "budget" in reason or "tokens" in reason or "sets" in reason, reason
            self.counts["refused"] += 1
            req.prompt, req.origin_input_ids, params.max_new_tokens = np.zeros(1), [0], 1
        self.scheduler.waiting.append(req)

    def _options(self) -> dict[str, Any] | None:
        chance, options = self.chance, dict[str, Any]()
        if chance.random() < 0.15:
            options["policy"] = "full"
        elif chance.random() < 0.3:
            options["budget"] = chance.choice([AUTO, 0.3, AUTO] if self.auto else [0.05, 0.3, 0.8])
        if chance.random() < self.resident:
            options["prefill"] = "resident"
        if chance.random() < 0.15:
            options["dense_steps"] = chance.choice([6, 1000])
        elif chance.random() < 0.05:
            options["sets"] = "1900:20:0,1,2;1950:22:0,3"
        if chance.random() < 0.03:
            options["budget"] = -1
        return {"lsa": options} if options else None


def failure_of(
    seed: int,
    steps: int = 150,
    page: int = 64,
    own_index: bool = False,
    groups: bool = False,
    auto: bool = False,
    paced: bool = False,
) -> tuple[str | None, collections.Counter[str]]:
    """Run one seed: what went wrong (None: nothing), and what happened how often."""
    simulation = Simulation(seed, page=page, own_index=own_index, groups=groups, auto=auto, paced=paced)
    try:
        simulation.run(steps)
        simulation.counts["exchanged"] = simulation.runtime.lookahead.counts.exchanged
    except Exception:
        return f"{simulation}\n{traceback.format_exc(limit=-6)}", simulation.counts
    return None, simulation.counts


def _quiet() -> None:
    logging.disable(logging.CRITICAL)  # injected failures are logged with their tracebacks
    torch.set_num_threads(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every seed ended well, 1 when one did not."""
    parser = argparse.ArgumentParser(description="Run the simulation for many seeds.")
    parser.add_argument("--seeds", type=int, default=200, help="how many (200)")
    parser.add_argument("--first", type=int, default=0, help="the first one (0)")
    parser.add_argument("--steps", type=int, default=150, help="scheduler rounds in which requests arrive (150)")
    parser.add_argument("--page", type=int, default=64, help="tokens of a page (64)")
    parser.add_argument("--own-index", action="store_true", help="a model with an index of its own; pages of 256")
    parser.add_argument("--groups", action="store_true", help="requests over one prefix read pages together")
    parser.add_argument("--auto", action="store_true", help="sets are as large as they need to be")
    parser.add_argument("--paced", action="store_true", help="prompts wait for decode steps")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    args = parser.parse_args(argv)
    began, total, failed = time.monotonic(), collections.Counter[str](), 0
    page = 256 if args.own_index else args.page
    work = [
        (seed, args.steps, page, args.own_index, args.groups, args.auto, args.paced)
        for seed in range(args.first, args.first + args.seeds)
    ]
    with multiprocessing.Pool(args.jobs, initializer=_quiet) as pool:
        for done, (failure, counts) in enumerate(pool.imap(_run, work), 1):
            total += counts
            if failure is not None:
                failed += 1
                print(failure)
            if done % 100 == 0:
                seconds = time.monotonic() - began
                print(f"{done} of {args.seeds} seeds, {failed} failed, {seconds:.0f} s", file=sys.stderr)
    print(f"{args.seeds} seeds, {failed} failed: " + ", ".join(f"{what} {n}" for what, n in sorted(total.items())))
    return int(failed > 0)


def _run(work: tuple[int, int, int, bool, bool, bool, bool]) -> tuple[str | None, collections.Counter[str]]:
    return failure_of(*work)


if __name__ == "__main__":
    sys.exit(main())
