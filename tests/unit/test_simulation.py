"""The whole runtime in a simulated server, for 200 seeds; and that it would find what it is there to find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulation import failure_of

from sglang_lsa.engine.choose import choose
from sglang_lsa.engine.prefill import Prefill
from sglang_lsa.engine.request import Request
from sglang_lsa.engine.step import Step
from sglang_lsa.memory.ledger import Ledger

SEEDS = range(200)


def failures(seeds: range = SEEDS, enough: int = 1, page: int = 64) -> list[str]:
    """What goes wrong with these seeds, up to so many, where a page has so many tokens."""
    found: list[str] = []
    for seed in seeds:
        failure, _ = failure_of(seed, page=page)
        found += [failure] if failure is not None else []
        if len(found) == enough:
            break
    return found


@pytest.mark.parametrize("part", range(4))
def test_nothing_is_read_wrong_lost_or_left(part: int) -> None:
    assert failures(SEEDS[part::4]) == []


@pytest.mark.parametrize(("page", "seeds"), [(16, range(40)), (256, range(20))])
def test_pages_of_other_sizes(page: int, seeds: range) -> None:
    """Nothing but the layout knows how many tokens a page has."""
    assert failures(seeds, page=page) == []


def test_it_finds_a_resident_prefix_that_is_committed_before_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second set displaced pages of the first instead of keeping within what was promised, and what a request
    reads changed before it was held."""

    def choose_resident(self: Prefill, step: Step) -> Step:
        assert step.readings is not None
        readings = list(step.readings)
        for index in step.looks:
            request = step.requests[index]
            cached = request.cached_pages
            found = choose(self.rules, self.scorer.score(request, cached).values(), cached, request.asked.budget)
            request.resident.prefix_positions, request.resident.prefix_ranks = found.positions, found.ranks
            here = self._here(request, found.positions)
            self.pager.retain(
                request.key, np.concatenate((request.pages[: len(here)][here], request.pages[len(here) :]))
            )
            if self.pager.hold(request.key, request.pages[: len(here)][here]):
                readings[index] = self._read(request, here)
        return step._replace(readings=tuple(readings), looks=())

    monkeypatch.setattr(Prefill, "choose_resident", choose_resident)
    assert failures()


def test_it_finds_a_promise_that_is_forgotten_during_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: dict[str, int] = {}

    queued: list[Request] = []
    begin_pass, end_pass = Prefill.begin_pass, Prefill.end_pass

    def begin(self: Prefill, *arguments: Any) -> Step:
        step = begin_pass(self, *arguments)
        queued[:] = step.requests
        for request in queued:
            forgotten[request.key] = self.pager.reservations.owed(request.key)
            self.pager.reservations.settle(request.key)
        return step

    def end(self: Prefill, *arguments: Any) -> None:
        end_pass(self, *arguments)
        for request in queued:
            if arguments[1] or request.resident.incomplete:
                self.pager.reservations.promise(request.key, forgotten[request.key])

    monkeypatch.setattr(Prefill, "begin_pass", begin)
    monkeypatch.setattr(Prefill, "end_pass", end)
    assert failures()


def test_it_finds_a_page_that_is_used_again_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up without waiting for the forward pass that reads it."""

    def evictable(self: Ledger) -> np.ndarray:
        v = self.p2v[(self.p2v > 0) & (self._copies == 0)]
        return v[(self._pins[v] == 0) & self._mirrored[v]]

    monkeypatch.setattr(Ledger, "_evictable", evictable)
    assert failures()
