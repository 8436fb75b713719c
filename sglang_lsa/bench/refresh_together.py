"""The scheduler's time for requests whose windows all begin in one step, stage by stage; a part of ``bench overhead``.

As on a GPU: scores are queued in one step and read two steps later, and the table changes where the window begins.
Scores are made beforehand, in the form in which a policy returns those of several requests; some 15 pages of each set
of a long context come from the mirror. Texts are random tokens, and looked up as in service.

The same for requests over one prefix, whose windows begin when they do in service: then all steps of a window are
measured, not only the three in which something is done for it.

To compare with another version of the package: ``cd OTHER && PYTHONPATH=. python .../refresh_together.py``.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sglang_lsa.bench.overhead import US, Scheduler
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.observe import QueryObserver
from sglang_lsa.engine.policies import Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.engine.window import BEATS
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.patches.requests import choose, promise

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

OWN_TOKENS, SHORTEST_SHARED = 1024, 8192
"""That each request over one prefix has behind it; and what they have in all, at least."""
SHARED_COLUMNS = {
    "requests": "requests",
    "tokens": "tokens",
    "groups": "groups",
    "answers": "answers",
    "window_us": "all steps of a window",
    "refresh_us": "its refresh",
    "form_us": "forming groups",
    "step_us": "least step",
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


class Agreeing(Drifting):
    """The same where most of what a page is worth is so for all requests, and they are looked up as they are for scores
    on a device."""

    def __init__(self, pages: int, requests: int) -> None:
        super().__init__(pages)
        self.common = np.exp(np.random.default_rng(99).normal(0, 2.0, pages)).astype(np.float32)
        self.observer = QueryObserver(requests + 2, 32, (0,), 1, 8, torch.float32, "cpu")

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        if request.key not in self.made:
            drift = np.random.default_rng(len(self.made)).normal(0, 0.7, (DRIFTS, self.pages))
            self.made[request.key] = self.common * np.exp(drift).astype(np.float32)
        return super().score(request, pages)

    def score_all(self, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> torch.Tensor:
        self.observer.asked(requests, pages)
        return super().score_all(requests, pages)


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


class Shared:
    """So many requests of so many tokens each over one prefix; what they say are random tokens, or always the same.

    Args:
        groups: whether they read together; then windows begin in every sixteenth step.
        circles: an answer repeats one token, as that of a model without trained weights may.
    """

    def __init__(self, requests: int, tokens: int, groups: bool, circles: bool):
        self.scheduler = scheduler = Scheduler(requests, tokens, policy="quest", groups=groups)
        self.runtime, self.circles = scheduler.runtime, circles
        self.chance = np.random.default_rng(0)
        lookahead = self.runtime.lookahead
        lookahead.scorer.policies = {"quest": Agreeing(pages_spanned(tokens, PAGE_SIZE) + 64, requests)}
        memory = self.chance.integers(0, VOCABULARY, tokens - OWN_TOKENS).tolist()
        prefix = np.zeros(0, dtype=np.int64)
        for _ in range(requests):
            prefix = self._prefill([*memory, *self.chance.integers(0, VOCABULARY, OWN_TOKENS).tolist()], prefix)
        for _ in range(WINDOW):
            self.decode()
        lookahead.clock.lead, lookahead.clock.lag = LEAD, LAG  # until here as on a CPU, where first sets come at once
        for place, request in enumerate(self.runtime.requests.values()):
            begins = LEAD + 1 + place * 13 % (WINDOW - LEAD)
            if groups:
                begins = LEAD * (1 + place % BEATS) - lookahead.clock.decoded % LEAD
            request.steps_left, request.lead = begins, LEAD
        for _ in range(2 * WINDOW):
            self.decode()

    def _prefill(self, text: list[int], prefix: np.ndarray) -> np.ndarray:
        """One more request, of whose text the radix tree has these pages. Returns those that it has for the next."""
        scheduler, tokens, cached = self.scheduler, len(text), len(prefix) * PAGE_SIZE
        req = scheduler.request(tokens, prefix)
        req.origin_input_ids, req.output_ids = array("q", text), array("q")
        admitted = choose(self.runtime.admission, req, len(scheduler.requests), [], None)
        if admitted is None:
            raise RuntimeError(f"no room for request {req.rid} beside {len(scheduler.requests)} others")
        promise(self.runtime.admission, req, admitted)
        scheduler.requests.append(req)
        new = scheduler.allocate(pages_spanned(tokens - cached, PAGE_SIZE))
        scheduler.run([req], [tokens], new, extend=True, prefix=[cached])
        return prefix if cached else new[: (tokens - OWN_TOKENS) // PAGE_SIZE]

    def decode(self) -> None:
        """A step of all requests."""
        for req in self.scheduler.requests:
            req.output_ids.append(7 if self.circles else int(self.chance.integers(VOCABULARY)))
        self.scheduler.decode()


def measure_shared(requests: int, tokens: int, groups: bool, circles: bool) -> dict[str, Any]:
    """Of one window of one request: microseconds of the scheduler in this package, each step the least of some windows.

    Raises:
        RuntimeError: some set was not brought in as it was chosen, so that something else was measured.
    """
    shared = Shared(requests, tokens, groups, circles)
    runtime, counts = shared.runtime, shared.runtime.lookahead.counts
    failed = counts.failures + counts.stalls + counts.fallbacks + counts.shrunk
    refreshes, steps, refreshing, forming = counts.refreshes, *np.zeros((3, WINDOWS, WINDOW))
    gc.collect()
    gc.disable()
    for window in range(WINDOWS):
        for step in range(WINDOW):
            before, formed = counts.host_seconds, runtime.groups.host_seconds if runtime.groups else 0.0
            shared.decode()
            steps[window, step], refreshing[window, step] = shared.scheduler.seconds, counts.host_seconds - before
            forming[window, step] = (runtime.groups.host_seconds if runtime.groups else 0.0) - formed
    gc.enable()
    if counts.failures + counts.stalls + counts.fallbacks + counts.shrunk != failed:
        raise RuntimeError(f"not every set was brought in as it was chosen: {counts}")
    if counts.refreshes - refreshes != WINDOWS * requests:
        raise RuntimeError(f"{counts.refreshes - refreshes} refreshes in {WINDOWS} windows of {requests} requests")
    each = {"window_us": steps, "refresh_us": refreshing, "form_us": forming}
    found = {name: float(some.min(axis=0).sum()) * US / requests for name, some in each.items()}
    facts = {"requests": requests, "tokens": tokens, "groups": groups, "answers": "circles" if circles else "random"}
    return facts | found | {"step_us": float(steps.min()) * US}


def run_shared(console: Console, requests: Sequence[int], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Measure requests over one prefix, and print a table; prefixes are of contexts of 8K tokens or more."""
    torch.set_num_threads(1)
    rows = [
        measure_shared(count, length, groups, circles)
        for length in tokens
        for count in requests
        if count > 1 and length >= SHORTEST_SHARED
        for groups in (False, True)
        for circles in (False, True)
    ]
    show(
        console,
        "Requests over one prefix: scheduler's time in LSA of one window of one, microseconds",
        SHARED_COLUMNS,
        rows,
    )
    return rows


def show(console: Console, title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table, if there is anything in it."""
    shown = Table(title=title)
    for name in columns.values():
        shown.add_column(name, justify="right")
    for row in rows:
        values = (row[name] for name in columns)
        shown.add_row(
            *(f"{v:,.0f}" if isinstance(v, float) else f"{v:,}" if type(v) is int else str(v) for v in values)
        )
    if rows:
        console.print(shown)


def run_together(console: Console, requests: Sequence[int], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Measure, and print a table; of one request there is nothing together."""
    torch.set_num_threads(1)
    rows = [measure_together(count, length) for length in tokens for count in requests if count > 1]
    show(console, "Windows that all begin in one step: scheduler's time in LSA, microseconds", COLUMNS, rows)
    return rows


if __name__ == "__main__":  # on another version of the package, which has no such command
    run_together(Console(width=120), (8, 32), (8192, 131072))
    run_shared(Console(width=120), (32,), (131072,))
