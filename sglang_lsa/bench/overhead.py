"""``sglang-lsa bench overhead``: the scheduler's time in this package, on any machine, without a model or a server.

Real parts (runtime, ledger, pager, lookahead) over small KV, driven by the calls that the hooks make, with the policy
``random``, which costs next to nothing and changes nearly the whole set. Whatever a device does is not in it; copies
between pools and mirror, which a CPU makes itself, are small, but are.

To compare with another version of the package: ``cd OTHER && python - < .../sglang_lsa/bench/overhead.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.patches.batch import batch_of
from sglang_lsa.patches.requests import can_decode, choose, promise, request_gone
from sglang_lsa.serve.status import status

STEPS = 256
"""Decode steps that are measured: four windows."""
LONG = 1 << 20
"""Tokens of the request whose end is measured, and windows that it has read by then."""
LONG_WINDOWS = 32
US, MS = 1e6, 1e3


class Scheduler:
    """As much of SGLang as the runtime sees: requests, their rows, and an allocator of pages.

    Args:
        requests: that can run at a time.
        tokens: of the longest of them.
    """

    def __init__(self, requests: int, tokens: int, **options: object):
        pages = pages_spanned(tokens, PAGE_SIZE) + 64
        physical = int(0.3 * requests * pages) + pages  # a prompt in full beside the sets of the others
        virtual = (requests + 1) * pages + physical
        keys, values = ([torch.zeros((physical + 1) * PAGE_SIZE, 1, 2)] for _ in range(2))
        self.pager = Pager(MhaLayout(keys, values, PAGE_SIZE), virtual)
        self.table = torch.zeros((requests + 2, tokens + 64 * PAGE_SIZE), dtype=torch.int32)
        # The budget alone bounds sets: short contexts stand for long ones, and rows of before stay comparable.
        asked = {"policy": "random", "min_context": 1024, "floor_tokens": 0, **options}
        config = LSAConfig.from_mapping(asked)
        self.runtime = LSARuntime(config, self.pager, self.table, 1, 1.0)
        self.requests: list[Any] = []
        self.next_page = 1

    def allocate(self, count: int) -> np.ndarray:
        pages = np.arange(self.next_page, self.next_page + count, dtype=np.int64)
        self.next_page += count
        self.pager.ledger.allocate(pages)
        return pages

    def request(self, tokens: int, prefix: np.ndarray | None = None) -> Any:
        """One that has just come; the radix tree has the pages ``prefix`` of it, in one node."""
        number = len(self.requests) + 1
        pages = np.zeros(0, dtype=np.int64) if prefix is None else prefix
        slots = (torch.from_numpy(pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
        node = SimpleNamespace(value=slots, parent=SimpleNamespace(parent=None, value=[]))
        if (index := getattr(self.pager, "page_index", None)) is not None:
            index.note(slots, pages)
        req = SimpleNamespace(
            rid=f"r{number}",
            req_pool_idx=number,
            origin_input_ids=range(tokens),
            output_ids=[],
            full_untruncated_fill_ids=range(tokens),
            prefix_indices=slots,
            last_node=node,
            sampling_params=SimpleNamespace(custom_params=None, max_new_tokens=1 << 20),
            kv_committed_len=tokens,
            finished=lambda: False,
            prefix_len=len(slots),
        )
        req.kv = req  # where newer releases have it
        return req

    def prefill(self, tokens: int) -> None:
        """A prompt, in one pass."""
        req = self.request(tokens)
        admitted = choose(self.runtime.admission, req, len(self.requests), [], None)
        if admitted is None:
            raise RuntimeError(f"no room for request {req.rid}: {self.pager.ledger.held_pages} pages are held")
        promise(self.runtime.admission, req, admitted)
        self.requests.append(req)
        self.run([req], [tokens], self.allocate(pages_spanned(tokens, PAGE_SIZE)), extend=True, prefix=[0])

    def crowd(self) -> None:
        """Others take the device pages but for two sets of each request: from now on, pages come from the mirror."""
        lookahead, ledger = self.runtime.lookahead, self.pager.ledger
        two = sum(
            2 * lookahead.rules.set_pages(len(r.pages), r.asked.budget) + 8 for r in self.runtime.requests.values()
        )
        others = ledger.physical_pages - max(two, ledger.held_pages + 2 * len(self.requests))
        if others > 0 and not self.pager.hold("others", self.allocate(others)):
            raise RuntimeError(f"no room for {others} other pages beside {ledger.held_pages} that are held")

    def decode(self) -> None:
        """A step of all requests; :attr:`seconds` is the time that it took."""
        for req in self.requests:
            req.kv_committed_len += 1
        lengths = [req.kv_committed_len for req in self.requests]
        self.run(self.requests, lengths, self.allocate(sum(tokens % PAGE_SIZE == 1 for tokens in lengths)))

    def run(
        self,
        reqs: Sequence[Any],
        lengths: Sequence[int],
        new_pages: np.ndarray,
        extend: bool = False,
        prefix: Sequence[int] = (),
    ) -> None:
        batch = SimpleNamespace(
            reqs=list(reqs),
            prefix_lens=list(prefix),
            seq_lens_cpu=torch.tensor(lengths),
            forward_mode=SimpleNamespace(is_extend=lambda: extend, is_decode=lambda: not extend),
            chunked_req=None,
        )
        began = time.perf_counter()
        number = self.runtime.before_forward(batch_of(batch), new_pages)
        self.runtime.after_forward(number)
        self.seconds = time.perf_counter() - began


def measure_batch(requests: int, tokens: int) -> dict[str, Any]:
    """Requests of so many tokens each, all decoding: microseconds of the scheduler."""
    scheduler = Scheduler(requests, tokens)
    for _ in range(requests):
        scheduler.prefill(tokens)
    runtime = scheduler.runtime
    scheduler.crowd()
    for _ in range(64):  # first windows are shorter, and all at once
        scheduler.decode()
    steps, quiet = [], []
    refreshes, seconds = runtime.lookahead.counts.refreshes, runtime.lookahead.counts.host_seconds
    for _ in range(STEPS):
        before = runtime.lookahead.counts.refreshes
        scheduler.decode()
        steps.append(scheduler.seconds)
        if runtime.lookahead.counts.refreshes == before:
            quiet.append(scheduler.seconds)
    refreshes = runtime.lookahead.counts.refreshes - refreshes
    seconds = runtime.lookahead.counts.host_seconds - seconds
    reqs = scheduler.requests
    memory = runtime.requests[reqs[0].rid].pages[: pages_spanned(tokens, PAGE_SIZE) - 1]
    asked = scheduler.request(tokens + 512, memory)
    return {
        "requests": requests,
        "tokens": tokens,
        "step_us": statistics.median(quiet) * US if quiet else None,
        "mean_step_us": statistics.mean(steps) * US,
        "refresh_us": seconds / refreshes * US if refreshes else None,
        "can_decode_us": timed(lambda: can_decode(runtime, reqs)) * US,
        "choose_us": timed(lambda: choose(runtime.admission, asked, requests, [], 8192)) * US,
        "status_us": timed(lambda: status(runtime)) * US,
    }


def measure_end() -> dict[str, Any]:
    """The end of a request of a million tokens: milliseconds of the scheduler."""
    seconds = []
    for _ in range(3):
        scheduler = Scheduler(1, LONG, window=8)
        scheduler.prefill(LONG)
        for _ in range(8 * LONG_WINDOWS + 8):
            scheduler.decode()
        request = scheduler.runtime.requests["r1"]
        windows = len(request.story.windows)
        began = time.perf_counter()
        request_gone(scheduler.runtime, scheduler.requests[0])
        seconds.append(time.perf_counter() - began)
    return {"tokens": LONG, "windows": windows, "end_ms": min(seconds) * MS}


def timed(call: Callable[[], object], repeats: int = 50) -> float:
    """Median seconds of one call."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def run(console: Console, requests: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
    """Measure, and print a table."""
    torch.set_num_threads(1)
    rows = [measure_batch(count, length) for length in tokens for count in requests]
    end = measure_end()
    console.print(table(rows))
    console.print(f"end of a request of {end['tokens']:,} tokens, {end['windows']} windows: {end['end_ms']:.2f} ms")
    return {"batches": rows, "end": end, "steps": STEPS}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    titles = {
        "requests": "requests",
        "tokens": "tokens",
        "step_us": "step without refresh",
        "mean_step_us": "step, mean",
        "refresh_us": "refresh of one request",
        "can_decode_us": "can_decode",
        "choose_us": "choose",
        "status_us": "status",
    }
    shown = Table(title="Scheduler's time in LSA, microseconds")
    for title in titles.values():
        shown.add_column(title, justify="right")
    for row in rows:
        shown.add_row(*("-" if row[name] is None else f"{row[name]:,.0f}" for name in titles))
    return shown


if __name__ == "__main__":  # on another version of the package, which has no such command
    run(Console(width=120), (1, 8, 32), (8192, 131072))
