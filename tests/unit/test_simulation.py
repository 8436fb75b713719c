"""The whole runtime in a simulated server, for 200 seeds; and that it would find what it is there to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from simulation import failure_of

from sglang_lsa.engine.choose import choose
from sglang_lsa.engine.prefill import Prefill
from sglang_lsa.memory.ledger import Ledger

SEEDS = range(200)


def failures(seeds: range = SEEDS, enough: int = 1) -> list[str]:
    """What goes wrong with these seeds, up to so many."""
    found: list[str] = []
    for seed in seeds:
        failure, _ = failure_of(seed)
        found += [failure] if failure is not None else []
        if len(found) == enough:
            break
    return found


@pytest.mark.parametrize("part", range(4))
def test_nothing_is_read_wrong_lost_or_left(part: int) -> None:
    assert failures(SEEDS[part::4]) == []


def test_it_finds_a_resident_prefix_that_is_committed_before_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second set displaced pages of the first instead of keeping within what was promised, and what a request
    reads changed before it was held."""

    def choose_resident(self: Prefill) -> None:
        for index in self.looking:
            request = self.batch[index]
            cached = request.cached_pages
            found = choose(self.rules, self.scorer.score(request, cached).values(), cached, request.asked.budget)
            request.resident.prefix_positions, request.resident.prefix_ranks = found.positions, found.ranks
            here = self._here(request, found.positions)
            self.pager.retain(
                request.key, np.concatenate((request.pages[: len(here)][here], request.pages[len(here) :]))
            )
            if self.pager.hold(request.key, request.pages[: len(here)][here]):
                assert self.readings is not None
                self.readings[index] = self._read(request, here)
        self.looking = []

    monkeypatch.setattr(Prefill, "choose_resident", choose_resident)
    assert failures()


def test_it_finds_a_promise_that_is_forgotten_during_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: dict[str, int] = {}

    def around(original: Callable[..., None], before: bool) -> Callable[..., None]:
        def pass_(self: Prefill, *arguments: Any) -> None:
            original(self, *arguments)
            reservations = self.pager.reservations
            if before:
                for request in self.batch:
                    forgotten[request.key] = reservations.owed(request.key)
                    reservations.settle(request.key)
            else:
                for request in self.batch:
                    if arguments[1] or request.resident.incomplete:
                        reservations.promise(request.key, forgotten[request.key])

        return pass_

    monkeypatch.setattr(Prefill, "begin_pass", around(Prefill.begin_pass, before=True))
    monkeypatch.setattr(Prefill, "end_pass", around(Prefill.end_pass, before=False))
    assert failures()


def test_it_finds_a_page_that_is_used_again_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up without waiting for the forward pass that reads it."""

    def evictable(self: Ledger) -> np.ndarray:
        v = self.p2v[(self.p2v > 0) & (self._copies == 0)]
        return v[(self._pins[v] == 0) & self._mirrored[v]]

    monkeypatch.setattr(Ledger, "_evictable", evictable)
    assert failures()
