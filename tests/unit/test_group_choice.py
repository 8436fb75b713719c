"""Choose for the group, where sets are chosen: who looks at what others read, and what a failure costs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.counts import Counts
from sglang_lsa.engine.grouping import Company, Groups
from sglang_lsa.engine.groups import GroupRules
from sglang_lsa.engine.refresh import Refresher
from sglang_lsa.engine.remap import ResidentSets
from sglang_lsa.engine.request import Asked, Refresh, Request, State
from sglang_lsa.engine.window import Clock
from sglang_lsa.memory.ledger import Ledger
from sglang_lsa.memory.resident_table import ResidentTable

PAGE, MEMORY = 64, 12
ANY = GroupRules(least_saved=1e-9)


class World:
    """Requests over one memory of which some read a set, and the part of the runtime that chooses new ones."""

    def __init__(self, margin: float, requests: int = 3):
        config = LSAConfig(
            groups=True,
            group_margin=margin,
            budget=0.5,
            min_pages=1,
            floor_tokens=0,
            sink_pages=1,
            recent_pages=1,
            prompt_pages=0,
            threshold=-1.0,
        )
        self.ledger = Ledger(virtual_pages=60, physical_pages=60)
        self.sets = ResidentSets(ResidentTable(requests + 1, 40, PAGE), self.ledger)
        self.groups, self.counts = Groups(self.sets, ANY), Counts()
        pager: Any = SimpleNamespace(page=PAGE, ledger=self.ledger)
        scorer: Any = SimpleNamespace(policies={"quest": SimpleNamespace(queries=False)})
        self.refresher = Refresher(Rules(config, 100), Clock(8, 0, 0), pager, self.sets, scorer, self.counts)
        self.requests: list[Request] = []
        self.formed = 0
        for number in range(requests):
            request = Request(f"r{number}", number + 1, Asked("quest", 0.5), prompt_tokens=PAGE * MEMORY)
            request.pages = np.array([*range(MEMORY), 40 + number], dtype=np.int64)
            self.ledger.v2p[request.pages] = request.pages
            self.sets.enter(request.row)
            self.requests.append(request)
        if margin:
            self.refresher.chooser.company = self.company

    def company(self, choosing: Sequence[Request]) -> Company:
        self.formed += 1
        return self.groups.company(choosing, self.requests)

    def reads(self, request: Request, positions: list[int]) -> None:
        self.sets.remap(request, np.array(positions, dtype=np.int64), MEMORY)

    def chosen(self, scores: dict[int, dict[int, float]]) -> list[list[int]]:
        """The sets of those requests whose refresh ends in this step, by their scores of some pages."""
        choosing = [self.requests[number] for number in scores]
        for request, some in zip(choosing, scores.values(), strict=True):
            values = np.zeros(MEMORY)
            values[list(some)] = list(some.values())
            fetch: Any = SimpleNamespace(values=lambda values=values: values, device_seconds=0.0, failed=False)
            request.resident.next = Refresh(PAGE * MEMORY + 1, MEMORY, MEMORY + 1, due=0, scores=fetch)
        failed = self.refresher.chooser.choose_all(choosing)
        assert not failed, failed
        found = [request.resident.next for request in choosing]
        assert all(new is not None and new.state is State.CHOSEN for new in found)
        return [new.positions.tolist() for new in found if new is not None]


OTHERS = [0, 1, 2, 3, 4]
"""Read by others of a memory."""
LIKES_7 = {1: 0.9, 2: 0.8, 3: 0.7, 7: 0.5, 4: 0.48}


def test_a_refresh_looks_at_what_others_read() -> None:
    for margin, expected in ((0.0, [0, 1, 2, 3, 7]), (0.01, [0, 1, 2, 3, 7]), (0.1, [0, 1, 2, 3, 4])):
        world = World(margin)
        for request in world.requests[:2]:
            world.reads(request, OTHERS)
        assert world.chosen({2: LIKES_7}) == [expected]
        assert world.counts.exchanged == (expected[-1] == 4)
        ranks = world.requests[2].resident.next.ranks  # type: ignore[union-attr]
        assert ranks is not None and ranks.tolist() == [np.inf, 0.9, 0.8, 0.7, 0.48 if expected[-1] == 4 else 0.5]


def test_two_are_enough() -> None:
    """A page that one other reads is read for both, if both read it."""
    world = World(0.1, requests=2)
    world.reads(world.requests[0], OTHERS)
    assert world.chosen({1: LIKES_7}) == [[0, 1, 2, 3, 4]]


def test_sets_that_are_chosen_in_one_step_look_at_each_other() -> None:
    """Page 4 is one of those that two of them would read, so the third takes it; whoever comes first."""
    likes_4 = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6, 9: 0.1}
    for order in ((0, 1, 2), (2, 1, 0)):
        scores = {number: LIKES_7 if number == 2 else likes_4 for number in order}
        found = World(0.1).chosen(scores)
        assert all(each == [0, 1, 2, 3, 4] for each in found)


def test_groups_are_formed_once_for_all_windows_that_end_together() -> None:
    world = World(0.1, requests=12)
    world.chosen({number: LIKES_7 for number in range(12)})
    assert world.formed == 1
    world.refresher.chooser.choose_all(world.requests)
    assert world.formed == 1, "nobody chose"


def test_where_no_groups_can_be_formed_all_keep_what_they_read() -> None:
    def broken(choosing: Sequence[Request]) -> Company:
        raise RuntimeError("no groups")

    world = World(0.1)
    world.refresher.chooser.company = broken
    with pytest.raises(AssertionError, match=r"r0.*no groups.*r2.*no groups"):
        world.chosen({0: LIKES_7, 2: LIKES_7})


def test_who_reads_everything_or_another_text_is_not_asked() -> None:
    world = World(0.1)
    world.reads(world.requests[0], OTHERS)  # the second reads everything
    world.requests[0].pages = np.array([*range(20, 20 + MEMORY), 50])
    assert world.chosen({2: LIKES_7}) == [[0, 1, 2, 3, 7]]


def test_sets_that_a_request_names_stay() -> None:
    world = World(0.9)
    for request in world.requests[:2]:
        world.reads(request, OTHERS)
    new = Refresh(PAGE * MEMORY + 1, MEMORY, MEMORY + 1, due=0, state=State.CHOSEN)
    new.positions, new.tail_start = np.array([0, 8]), MEMORY
    world.requests[2].resident.next = new
    world.refresher.chooser.choose_all(world.requests[2:])
    assert new.positions.tolist() == [0, 8]


def test_a_failure_costs_the_set_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0.1)
    for request in world.requests[:1]:
        world.reads(request, OTHERS)
    common = Company.common

    def broken(self: Company, request: Request, positions: np.ndarray) -> Any:
        return "no positions" if request.rid == "r1" else common(self, request, positions)

    monkeypatch.setattr(Company, "common", broken)
    for number in (1, 2):
        world.requests[number].resident.next = None
    with pytest.raises(AssertionError, match="r1"):
        world.chosen({1: LIKES_7, 2: LIKES_7})
    new = world.requests[2].resident.next
    assert new is not None and new.state is State.CHOSEN


def test_who_gets_no_new_set_is_seen_with_the_one_it_keeps() -> None:
    """Its scores could not be read: it goes on reading what it read, which others may share."""
    world = World(0.1, requests=2)
    world.reads(world.requests[0], OTHERS)

    def lost() -> np.ndarray:
        raise RuntimeError("the scores are lost")

    values = np.zeros(MEMORY)
    values[list(LIKES_7)] = list(LIKES_7.values())
    for request, read in zip(world.requests, (lost, lambda: values), strict=True):
        fetch: Any = SimpleNamespace(values=read, device_seconds=0.0, failed=False)
        request.resident.next = Refresh(PAGE * MEMORY + 1, MEMORY, MEMORY + 1, due=0, scores=fetch)
    assert list(world.refresher.chooser.choose_all(world.requests)) == [world.requests[0].key]
    new = world.requests[1].resident.next
    assert new is not None and new.positions.tolist() == OTHERS
