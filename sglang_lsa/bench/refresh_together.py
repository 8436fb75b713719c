"""The scheduler's time for requests whose windows all begin in one step, stage by stage; a part of ``bench overhead``.

As on a GPU: scores are queued in one step and read two steps later, and the table changes where the window begins.
Scores are made beforehand, in the form in which a policy returns those of several requests; some 15 pages of each set
of a long context come from the mirror. Texts are random tokens, and looked up as in service.

To compare with another version of the package: ``cd OTHER && PYTHONPATH=. python .../refresh_together.py``.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sglang_lsa.bench.overhead import US, Scheduler
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.policies import Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.memory.pages import pages_spanned

WINDOW, LEAD, LAG = 64, 16, 2
WINDOWS = 12
"""That are measured; the least of them counts, step by step, since whatever else a machine does only adds to it."""
DRIFTS = 16
"""Scores of each request, taken in turns; so many that not all of their pages can stay on the device."""
VOCABULARY = 128_256
COLUMNS = {
    "requests": "requests",
    "tokens": "tokens",
    "queue_us": "queue scores",
    "choose_us": "choose and send for",
    "switch_us": "switch",
    "total_us": "all stages",
    "request_us": "a request",
}


class Drifting(Policy):
    """Scores that were made beforehand: heavy-tailed, and partly others in every window."""

    name = "quest"
    queries = True

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.made: dict[str, np.ndarray] = {}

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        if request.key not in self.made:
            chance = np.random.default_rng(len(self.made))
            own, drift = chance.normal(0, 2.0, self.pages), chance.normal(0, 0.7, (DRIFTS, self.pages))
            self.made[request.key] = np.exp(own + drift).astype(np.float32)
        return self.made[request.key][request.window % DRIFTS, : len(pages)]

    def score_all(self, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([self.score(*one) for one in zip(requests, pages, strict=True)]))


def together(requests: int, tokens: int) -> Scheduler:
    """So many requests of so many tokens each that decode, and whose windows all begin in one step."""
    scheduler = Scheduler(requests, tokens, policy="quest")
    lookahead = scheduler.runtime.lookahead
    lookahead.scorer.policies = {"quest": Drifting(pages_spanned(tokens, PAGE_SIZE) + 64)}
    chance = np.random.default_rng(0)
    for _ in range(requests):
        scheduler.prefill(tokens)
        scheduler.requests[-1].origin_input_ids = array("q", chance.integers(0, VOCABULARY, tokens).tolist())
        scheduler.requests[-1].output_ids = array("q")
    scheduler.crowd()
    for _ in range(WINDOW):
        scheduler.decode()
    lookahead.clock.lead, lookahead.clock.lag = LEAD, LAG  # until here as on a CPU, where first sets come at once
    for request in scheduler.runtime.requests.values():
        request.steps_left, request.lead = WINDOW - 1, LEAD
    for _ in range(2 * WINDOW):
        scheduler.decode()
    return scheduler


def measure_together(requests: int, tokens: int) -> dict[str, Any]:
    """The same for some windows: microseconds of the scheduler, of all requests together.

    Raises:
        RuntimeError: some set was not brought in as it was chosen, so that something else was measured.
    """
    scheduler = together(requests, tokens)
    counts, ledger = scheduler.runtime.lookahead.counts, scheduler.pager.ledger
    recalls, failed = ledger.recalls, counts.failures + counts.stalls + counts.fallbacks + counts.shrunk
    windows = np.zeros((WINDOWS, WINDOW))
    gc.collect()
    gc.disable()
    for window in windows:
        for step in range(WINDOW):
            before = counts.host_seconds
            scheduler.decode()
            window[step] = counts.host_seconds - before
    gc.enable()
    if counts.failures + counts.stalls + counts.fallbacks + counts.shrunk != failed:
        raise RuntimeError(f"not every set was brought in as it was chosen: {counts}")
    least = windows.min(axis=0) * US
    queue, choose, switch = least[np.sort(np.argsort(-least)[:3])].tolist()
    return {
        "requests": requests,
        "tokens": tokens,
        "recalled_pages": (ledger.recalls - recalls) / WINDOWS / requests,
        "queue_us": queue,
        "choose_us": choose,
        "switch_us": switch,
        "total_us": queue + choose + switch,
        "request_us": (queue + choose + switch) / requests,
    }


def run_together(console: Console, requests: Sequence[int], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Measure, and print a table; of one request there is nothing together."""
    torch.set_num_threads(1)
    rows = [measure_together(count, length) for length in tokens for count in requests if count > 1]
    shown = Table(title="Windows that all begin in one step: scheduler's time in LSA, microseconds")
    for title in COLUMNS.values():
        shown.add_column(title, justify="right")
    for row in rows:
        shown.add_row(*(f"{row[name]:,.0f}" for name in COLUMNS))
    if rows:
        console.print(shown)
    return rows


if __name__ == "__main__":  # on another version of the package, which has no such command
    run_together(Console(width=120), (8, 32), (8192, 131072))
