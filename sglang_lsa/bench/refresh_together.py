"""The scheduler's time for requests whose windows end in the same step, stage by stage; a part of ``bench overhead``.

As a GPU would have it: scores are queued in one step, read two later, and the table changes where the window begins.
Scores are made beforehand, in the form in which a policy returns those of several requests; a fifth to a third of each
set changes in a window. Texts are random tokens, looked up for what they repeat as they are in service.

To compare with another version of the package: ``cd OTHER && PYTHONPATH=. python .../refresh_together.py``.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang_lsa.bench.overhead import Scheduler
from sglang_lsa.engine.policies import Policy
from sglang_lsa.engine.request import Request

WINDOW, LEAD, LAG = 64, 16, 2
WINDOWS = 8
"""That are measured."""
DRIFTS = 16
"""Scores of each request, taken in turns."""
VOCABULARY = 128_256


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


def measure_together(requests: int, tokens: int, **options: object) -> dict[str, Any]:
    """So many requests whose windows all end in the same step: microseconds of the scheduler for all of them.

    Args:
        tokens: of each.
        options: of the configuration.
    """
    scheduler = together(requests, tokens, **options)
    counts, clock = scheduler.runtime.lookahead.counts, scheduler.runtime.lookahead.clock
    recalls = scheduler.pager.ledger.recalls
    found: list[dict[int, float]] = []
    failed = counts.failures + counts.stalls + counts.fallbacks + counts.shrunk
    gc.collect()
    gc.disable()
    for _ in range(WINDOWS):
        began, spent = clock.step, {}
        for _ in range(WINDOW):
            before, step = counts.host_seconds, clock.step
            scheduler.decode()
            spent[step - began] = counts.host_seconds - before
        found.append(spent)
    gc.enable()
    if counts.failures + counts.stalls + counts.fallbacks + counts.shrunk != failed:
        raise RuntimeError(f"not every set was brought in as it was chosen: {counts}")
    least = [min(spent[step] for spent in found) for step in range(WINDOW)]
    queue, choose, switch = (least[step] * 1e6 for step in sorted(sorted(range(WINDOW), key=lambda s: -least[s])[:3]))
    return {
        "requests": requests,
        "tokens": tokens,
        "recalled_pages": (scheduler.pager.ledger.recalls - recalls) / WINDOWS / requests,
        "queue_us": queue,
        "choose_us": choose,
        "switch_us": switch,
        "total_us": min(sum(spent.values()) for spent in found) * 1e6,
    }


def together(requests: int, tokens: int, **options: object) -> Scheduler:
    """So many requests that decode, and whose next windows end in the same step."""
    scheduler = Scheduler(requests, tokens, policy="quest", **options)
    lookahead = scheduler.runtime.lookahead
    lookahead.scorer.policies = {"quest": Drifting(tokens // 64 + 64)}
    lookahead.clock.lead, lookahead.clock.lag = LEAD, LAG
    chance = np.random.default_rng(0)
    for _ in range(requests):
        scheduler.prefill(tokens)
        scheduler.requests[-1].origin_input_ids = array("q", chance.integers(0, VOCABULARY, tokens).tolist())
        scheduler.requests[-1].output_ids = array("q")
    scheduler.crowd()
    for _ in range(WINDOW):
        scheduler.decode()
    while any(request.resident.next is not None for request in scheduler.runtime.requests.values()):
        scheduler.decode()
    for request in scheduler.runtime.requests.values():
        request.steps_left = WINDOW - 1
    for _ in range(2 * WINDOW):
        scheduler.decode()
    return scheduler


if __name__ == "__main__":
    torch.set_num_threads(1)
    for requests, tokens in ((32, 131072), (8, 40960), (32, 8192)):
        runs = [measure_together(requests, tokens) for _ in range(3)]
        least = min(runs, key=lambda run: run["total_us"])
        print({name: round(value, 1) for name, value in least.items()}, flush=True)
