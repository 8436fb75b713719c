"""Requests whose windows end in the same step are refreshed together, and each gets what it would get alone."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from simulation import Simulation

from sglang_lsa.bench.overhead import Scheduler
from sglang_lsa.bench.refresh_together import WINDOW, together
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine import choose_together
from sglang_lsa.engine.policies import Policy
from sglang_lsa.engine.refresh import Refresher
from sglang_lsa.engine.request import Refresh, Request
from sglang_lsa.memory.scores import Reduction
from sglang_lsa.memory.standby import Standby
from sglang_lsa.patches.requests import choose, promise


class Company(Policy):
    """Scores by the request, its window and its length; some windows have none, or no numbers, or an error."""

    name = "quest"
    queries = True
    across_ranks = Reduction.MAX

    def __init__(self) -> None:
        self.together_with: list[int] = []

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        chance = np.random.default_rng((zlib.crc32(request.key.encode()), request.window + 2, len(pages)))
        scores = chance.random(len(pages)).round(2)  # with ties
        what = chance.random()
        if what < 0.05:
            raise RuntimeError("injected: no scores")
        if what < 0.1:
            scores[::2] = np.nan
        elif what < 0.15:
            scores[:] = -np.inf
        return scores

    def score_all(self, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> torch.Tensor:
        self.together_with.append(len(requests))
        return torch.cat([torch.from_numpy(self.score(*one)) for one in zip(requests, pages, strict=True)])


class Watched(Simulation):
    """Writes down after every step what each request reads, where every page is, and what was counted."""

    def __init__(self, seed: int, alone: bool, **options: Any):
        super().__init__(seed, **options)
        self.company = Company()
        self.runtime.lookahead.scorer.policies = {**self.runtime.lookahead.scorer.policies, "quest": self.company}
        self.seen: list[Any] = []
        refresher = self.runtime.lookahead.refresher

        def copies_apart(request: Request, new: Refresh) -> bool:
            """One copy for all comes at another time, and by that admission decides."""
            return self.pager.hold_if_spare(request.key, new.needed(request.pages), refresher._spare(request))

        refresher._hold_all = copies_apart  # type: ignore[method-assign]
        if alone:
            lookahead = self.runtime.lookahead
            begin = lookahead.begin
            lookahead.begin = lambda request, later=None: begin(request)  # type: ignore[method-assign]
            start, choose_now, advance = refresher.start, refresher.choose_now, refresher._advance

            def start_each(requests: Sequence[Request]) -> None:
                for request in requests:
                    start([request])

            def choose_each(requests: Sequence[Request], predict: bool = False) -> None:
                for request in requests:
                    choose_now([request], predict)

            def advance_each() -> None:
                for request in list(refresher.on_their_way.values()):
                    advance([request])

            refresher.start, refresher.advance = start_each, advance_each  # type: ignore[method-assign]
            refresher.choose_now = choose_each  # type: ignore[method-assign]

    def step(self) -> bool:
        ran = super().step()
        counts, ledger = vars(self.runtime.lookahead.counts).copy(), self.pager.ledger
        counts.pop("host_seconds")
        reads = [
            (
                key,
                one.resident.positions.tolist(),
                one.resident.tail_start,
                one.window,
                one.steps_left,
                one.story.stalls,
            )
            for key, one in self.runtime.requests.items()
        ]
        self.seen.append((reads, ledger.v2p.tobytes(), ledger.held_pages, ledger.recalls, counts))
        return ran


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.slow) for part in (2, 3))])
def test_each_gets_what_it_would_get_alone(part: int) -> None:
    """To the last page and count, whatever policy, budget and length they have, whether they name their sets, and
    whoever fails, ends, is aborted, retracted or preempted in the same step."""
    groups = 0
    for seed in range(part, 40, 4):
        both = [Watched(seed, alone) for alone in (False, True)]
        for one in both:
            one.run()
        for step, (seen, expected) in enumerate(zip(both[0].seen, both[1].seen, strict=True)):
            assert seen == expected, f"seed {seed}, step {step}"
        assert max(both[1].company.together_with, default=1) == 1
        groups += sum(count > 1 for count in both[0].company.together_with)
    assert groups > 10


def decoded(requests: int, tokens: int, windows: int) -> list[Any]:
    """After every step of so many windows that all begin together: what each request reads, where every page is, and
    what was counted."""
    scheduler = together(requests, tokens)
    for number, req in enumerate(scheduler.requests[::2]):  # answers that copy their prompts
        req.output_ids = array("q", req.origin_input_ids[100 * number :][: 4 * WINDOW * windows])
    lookahead, ledger, seen = scheduler.runtime.lookahead, scheduler.pager.ledger, []
    for _ in range(WINDOW * windows):
        scheduler.decode()
        counts = vars(lookahead.counts) | {"host_seconds": 0, "late": scheduler.pager.late_pages}
        reads = [
            (one.resident.positions.tolist(), ranks if (ranks := one.resident.ranks) is None else ranks.tolist(), story)
            for one in scheduler.runtime.requests.values()
            for story in [(one.story.coverage, one.story.widened, one.resident.tail_start, one.steps_left)]
        ]
        seen.append((reads, ledger.v2p.tobytes(), ledger.recalls, ledger.evictions, list(ledger._free), counts))
    ledger.check()
    return seen


@pytest.mark.parametrize(("requests", "tokens"), [(2, 4096), (7, 8192)])
def test_what_is_done_together_is_what_is_done_one_after_the_other(
    requests: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets, order, device pages: where all windows begin in one step, as they hardly do in the simulation."""
    found = decoded(requests, tokens, 5)
    switched = []
    monkeypatch.setattr(choose_together, "FEWEST", 1 << 30)
    monkeypatch.setattr(Refresher, "_switch_all", lambda self, ready: switched.append(len(ready)))
    monkeypatch.setattr(Standby, "known", False)
    expected = decoded(requests, tokens, 5)
    for step, (seen, alone) in enumerate(zip(found, expected, strict=True)):
        assert seen == alone, f"step {step}"
    assert set(switched) == {requests} and found[-1][2] > found[0][2], "pages came from the mirror"


@pytest.mark.parametrize(("lag", "calls"), [(0, [1, 1, 1]), (2, [3])])
def test_first_sets_of_prompts_of_one_pass_are_scored_in_one_call(lag: int, calls: list[int]) -> None:
    """Where scores are there at once (CPU), each set is brought in before the next prompt lets go of its promise."""
    scheduler, company = Scheduler(3, 4096, policy="quest"), Company()
    scheduler.runtime.lookahead.scorer.policies = {"quest": company}
    scheduler.runtime.lookahead.clock.lag = lag
    for _ in range(3):
        req = scheduler.request(4096)
        admitted = choose(scheduler.runtime.admission, req, len(scheduler.requests), [], None)
        assert admitted is not None
        promise(scheduler.runtime.admission, req, admitted)
        scheduler.requests.append(req)
    pages = scheduler.allocate(3 * 4096 // PAGE_SIZE)
    scheduler.run(scheduler.requests, [4096] * 3, pages, extend=True, prefix=[0, 0, 0])
    assert company.together_with == calls
    for _ in range(3):
        scheduler.decode()
    assert [request.window for request in scheduler.runtime.requests.values()] == [0, 0, 0]
    assert all(request.resident.tail_start for request in scheduler.runtime.requests.values())
