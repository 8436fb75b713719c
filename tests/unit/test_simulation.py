"""The whole runtime in a simulated server, for 200 seeds; and that it would find what it is there to find."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from simulation import failure_of

from sglang_lsa.engine.choose import Chosen, choose
from sglang_lsa.engine.choose_together import Ask
from sglang_lsa.engine.chooser import Asking, Chooser
from sglang_lsa.engine.grouping import Grouping, Groups
from sglang_lsa.engine.observe_index import IndexRings, KeptIndexKeys
from sglang_lsa.engine.prefill import Prefill
from sglang_lsa.engine.request import Refresh, Request
from sglang_lsa.engine.step import Step
from sglang_lsa.memory.ledger import Ledger
from sglang_lsa.memory.pager import Pager

SEEDS = range(200)


def failures(
    seeds: range = SEEDS, enough: int = 1, page: int = 64, own_index: bool = False, groups: bool = False
) -> list[str]:
    """What goes wrong with these seeds, up to so many, where a page has so many tokens."""
    found: list[str] = []
    for seed in seeds:
        failure, _ = failure_of(seed, page=page, own_index=own_index, groups=groups)
        found += [failure] if failure is not None else []
        if len(found) == enough:
            break
    return found


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.slow) for part in (2, 3))])
def test_nothing_is_read_wrong_lost_or_left(part: int) -> None:
    assert failures(SEEDS[part::4]) == []


@pytest.mark.parametrize(
    ("page", "seeds"),
    [(16, range(20)), (256, range(20)), pytest.param(16, range(20, 40), marks=pytest.mark.slow)],
    ids=["16", "256", "16, more"],
)
def test_pages_of_other_sizes(page: int, seeds: range) -> None:
    """Nothing but the layout knows how many tokens a page has."""
    assert failures(seeds, page=page) == []


def test_sets_that_are_wider_than_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first, as of requests that repeat their prompts; nothing promised room for them."""
    ask, take, widened = Chooser.ask, Chooser.take, [0]

    def wider(self: Chooser, request: Request, new: Refresh) -> Ask | None:
        asked = ask(self, request, new)
        if asked is None or request.window <= 0:
            return asked
        return dataclasses.replace(asked, widen=4.0, follows=asked.context // 3 if asked.context % 2 else None)

    def noted(self: Chooser, one: Asking, found: Chosen | None) -> Any:
        widened[0] += found is not None and found.widened
        return take(self, one, found)

    monkeypatch.setattr(Chooser, "ask", wider)
    monkeypatch.setattr(Chooser, "take", noted)
    assert failures(range(1000, 1050)) == []
    assert widened[0] > 500


def test_sets_that_are_as_large_as_they_need_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far larger than was promised, and of all requests at once: nobody reads what is not there, nobody starves."""
    take = Chooser.take
    above, at_most, sets = [0], [0], [0]

    def noted(self: Chooser, one: Asking, found: Chosen | None) -> Any:
        choice = take(self, one, found)
        request, new, asked = one.request, one.new, one.request.asked
        if asked.target is not None and request.story.coverage is not None:
            pages, expected = len(new.positions) + new.context - new.complete, (new.context, asked.policy, asked.budget)
            sets[0] += 1
            above[0] += pages > self.rules.expected_pages(*expected, asked.target)
            at_most[0] += pages == self.rules.set_pages(new.context, asked.budget)
        return choice

    monkeypatch.setattr(Chooser, "take", noted)
    total = collections.Counter[str]()
    for seed in range(2000, 2060):
        failure, counts = failure_of(seed, auto=True)
        assert failure is None, failure
        total += counts
    assert sets[0] > above[0] > 1000 and at_most[0] > 500, (sets, above, at_most)
    for what in ("shrunk", "streamed", "resident", "recalled", "evicted", "retracted"):
        assert total[what] > 0, (what, total)


def test_it_finds_sets_that_grow_into_what_others_were_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that needs more than was promised takes the pages of a prompt that was admitted beside it."""

    def at_any_price(self: Pager, holder: str, pages: np.ndarray, spare: int) -> bool:
        return self.hold(holder, pages, for_later=True)

    monkeypatch.setattr(Pager, "hold_if_spare", at_any_price)
    failed = (failure for seed in range(2000, 2060) if (failure := failure_of(seed, auto=True)[0]) is not None)
    assert "more is promised than can be had" in next(failed, "nothing was found")


def test_prompts_that_wait_for_steps_between_their_chunks() -> None:
    """What is staged, promised or half computed for a prompt stays as it is while others decode, grow, come or go."""
    total = collections.Counter[str]()
    for seed in range(3000, 3060):
        failure, counts = failure_of(seed, paced=True, groups=seed % 4 == 0)
        assert failure is None, failure
        total += counts
    assert total["decoded between chunks"] > 500
    seen = ("shrunk", "streamed", "resident", "recalled", "evicted", "retracted", "preempted", "aborted in a prompt")
    for what in seen:
        assert total[what] > 0, (what, total)


def test_groups() -> None:
    """Requests over one document read its pages together, whoever comes, ends, is aborted, retracted, or gets another
    set in between; each reads all that it chose, nothing twice, and its own tokens."""
    total = collections.Counter[str]()
    for seed in range(60):
        failure, counts = failure_of(seed, groups=True)
        assert failure is None, failure
        total += counts
    assert total["read in groups"] > 1000 and total["read unasked"] > 100 and total["exchanged"] > 100
    assert total["recalled"] > 100
    for what in ("finished", "aborted", "retracted", "preempted"):
        assert total[f"member {what}"] > 0, f"no member was {what} in the middle of a window"
    assert total["full attention beside groups"] > 100


@pytest.mark.parametrize("what", ["who decodes", "what they read"])
def test_it_finds_groups_of_steps_before(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups stay what they were although a member left, or has another set."""
    of = Groups.of

    def stale(self: Groups, requests: Sequence[Request], *others: Any) -> Grouping | None:
        _, keys = self._of
        if what == "what they read" and keys == tuple(request.key for request in requests):
            return self.now
        if what == "who decodes" and len(keys) == len(requests):
            return self.now
        return of(self, requests, *others)

    monkeypatch.setattr(Groups, "of", stale)
    found = failures(range(40), groups=True)
    assert found and "AssertionError" in found[0], found


def test_a_model_with_an_index_of_its_own() -> None:
    """Pages are chosen by its keys of all pages and by what was asked last; a request scores by its own, whatever was
    recalled, shared or given up meanwhile, and whenever the device comes to it."""
    total = collections.Counter[str]()
    for seed in range(10):
        failure, counts = failure_of(seed, page=256, own_index=True)
        assert failure is None, failure
        total += counts
    assert total["scored"] > 100 and total["recalled"] > 100 and total["evicted"] > 100
    assert not total["streamed"] + total["resident"], "prompts are whole on the device"


def test_it_finds_index_keys_of_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several pages that a pass completes, those of the first are kept for all."""
    complete = KeptIndexKeys.complete

    def first(self: KeptIndexKeys, virtual: np.ndarray, physical: np.ndarray) -> None:
        complete(self, virtual, np.full_like(physical, physical[0]) if len(physical) else physical)

    monkeypatch.setattr(KeptIndexKeys, "complete", first)
    assert "have other keys" in failures(range(24), page=256, own_index=True)[0]


def test_it_finds_queries_of_tokens_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass is shown to the observer with the positions of the pass before."""
    begin = IndexRings.begin

    def late(self: IndexRings, rows: torch.Tensor, positions: torch.Tensor) -> None:
        begin(self, rows, (positions - 1).clamp(min=0))

    monkeypatch.setattr(IndexRings, "begin", late)
    assert "other queries" in failures(range(24), page=256, own_index=True)[0]


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
    """Given up without waiting for the forward pass that reads it; what the ledger checks itself by is as wrong."""

    def can_go(self: Ledger) -> np.ndarray:
        return self._idle & (self._copies == 0)

    monkeypatch.setattr(Ledger, "_can_go", can_go)
    monkeypatch.setattr(Ledger, "_evictable", lambda self: self.p2v[np.flatnonzero(self._can_go())])
    found = failures()
    assert found and "AssertionError" in found[0], found


def test_it_finds_passes_whose_reads_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that passes in flight may read are not remembered beside them: the ledger's own check says so."""
    read_by = Ledger._read_by

    def forgets(self: Ledger, passes: int, v: np.ndarray) -> None:
        read_by(self, passes, v)
        self._reading.clear()

    monkeypatch.setattr(Ledger, "_read_by", forgets)
    assert "it is forgotten that passes in flight may read a page" in failures()[0]
