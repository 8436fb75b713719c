"""Prefill over a resident prefix: a first look, a choice, and what is read then."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from prefill_server import Server
from promises import owed

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine import prefill as prefill_module
from sglang_lsa.engine.reading import IN_PLACE, RESIDENT
from sglang_lsa.patches.batch import batch_of
from sglang_lsa.patches.requests import key_of


def resident(server: Server, memory: np.ndarray, own: int = 2, rid: str = "a", row: int = 1, **lsa: object) -> Any:
    return server.request((len(memory) + own) * PAGE_SIZE, memory, rid, row, prefill="resident", **lsa)


def positions(req: Any, slots: list[int], server: Server) -> list[int]:
    """Of a request's tokens, pages that these slots fill."""
    pages = server.runtime.requests[req.rid].pages.tolist()
    found = [pages.index(slot // PAGE_SIZE) for slot in slots[::PAGE_SIZE]]
    assert slots == [pages[position] * PAGE_SIZE + token for position in found for token in range(PAGE_SIZE)]
    return found


def test_a_first_look_then_the_pages_that_it_asks_for() -> None:
    server = Server()
    memory = server.memory(40)
    server.push_off()
    server.wanted.values = {7: 3.0, 21: 2.0, 33: 1.0}
    req = resident(server, memory)
    assert server.admit(req) == [RESIDENT]
    (read,) = server.extend(req)
    assert read.look is not None
    assert positions(req, read.look, server) == [0, 39], "both ends: nothing else is known"
    assert positions(req, read.here, server) == [0, 7, 21, 33, 39]
    assert (read.streamed, server.step.staged) == ([], None)
    request = server.runtime.requests["a"]
    assert (request.story.prefill, request.cached_pages) == (RESIDENT, 40)
    assert server.prefill.resident_prompts == 1
    assert not server.runtime.shared.is_exact(key_of(req))
    assert server.ledger.recalls == 5
    assert server.lookahead.counts.failures == 0


@pytest.mark.parametrize("pages", [77, 94, 107])
def test_a_resident_prefix_has_all_pages_of_a_fixed_budget(pages: int) -> None:
    """Lengths at which the share that so many pages are would be rounded down to one page less."""
    server = Server(physical=120)
    memory = server.memory(pages)
    server.push_off()
    server.wanted.values = {position: 1.0 + position for position in range(pages)}
    req = resident(server, memory, budget=0.135)
    server.admit(req)
    (read,) = server.extend(req)
    assert len(positions(req, read.here, server)) == int(pages * 0.135)


def test_both_runs_hold_what_they_read_and_write() -> None:
    server = Server()
    memory = server.memory(40)
    server.push_off()
    server.wanted.values = {7: 3.0, 21: 2.0}
    req = resident(server, memory)
    server.admit(req)
    batch, new_pages = server.batch({}, req)
    number = server.runtime.before_forward(batch_of(batch), new_pages)
    assert server.runtime.step.looks
    assert server.held(req) == [0, 39, 40, 41]
    server.runtime.choose_resident()
    assert not server.runtime.step.looks, "there is no third run"
    assert server.held(req) == [0, 7, 21, 39, 40, 41]
    assert owed(server.pager) == {"a": 12 + 2 + 1 - 6}, "others cannot take what it may still need"
    server.write(server.slots(req, 40 * PAGE_SIZE, 42 * PAGE_SIZE))
    server.runtime.after_forward(number)


def test_the_look_has_hot_pages_that_are_on_the_device() -> None:
    """The others are sent for when the prompt is admitted, and take longer than it is worth waiting for."""
    server = Server()
    memory = server.memory(40)
    server.push_off()
    server.ledger.heat.select(memory[[5, 8, 12]])
    server.neighbour(memory[[8, 12]])
    server.late()
    req = resident(server, memory)
    server.admit(req)
    assert server.ledger.arriving(memory[[5]]).all()
    batch, new_pages = server.batch({}, req)
    server.runtime.before_forward(batch_of(batch), new_pages)
    assert server.readings[0].here.tolist() == memory[[0, 8, 12, 39]].tolist()


@pytest.mark.parametrize(
    ("budget", "most", "look"),
    [
        pytest.param(0.5, 32, [0, 10, 11, 12, 13, 39], id="half of the largest set"),
        pytest.param(0.2, 32, [0, 12, 13, 39], id="half of a set"),
        pytest.param(0.5, 3, [0, 11, 12, 13, 39], id="few"),
        pytest.param(0.1, 32, [0, 39], id="a small set"),
        pytest.param(0.02, 32, [39], id="a set of one page"),
    ],
)
def test_the_look_is_small(budget: float, most: int, look: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_module, "FIRST_LOOK_PAGES", most)
    server = Server()
    memory = server.memory(40)
    for page in memory[6:14]:  # the last is the hottest
        server.ledger.heat.select(np.array([page]))
    server.neighbour(memory[6:14])
    req = resident(server, memory, budget=budget)
    server.admit(req)
    (read,) = server.extend(req)
    assert read.look is not None
    assert positions(req, read.look, server) == look


@pytest.mark.parametrize(
    ("scores", "hot", "chosen"),
    [
        pytest.param({7: 1.0, 9: 1.0, 11: 1.0, 13: 1.0}, [], [0, 11, 13, 39], id="no heat: the latest"),
        pytest.param({7: 1.0, 9: 1.0, 11: 1.0, 13: 1.0}, [9, 7], [0, 7, 9, 39], id="heat decides ties"),
        pytest.param({7: 1.0, 9: 0.9, 11: 0.8}, [11, 9], [0, 9, 11, 39], id="heat decides what is close"),
        pytest.param({7: 2.1, 9: 2.2, 11: 1.0, 13: 1.0}, [11, 13], [0, 7, 9, 39], id="heat at most doubles a score"),
        pytest.param({7: 1.0}, [20, 21], [0, 7, 39], id="heat alone is not enough"),
    ],
)
def test_heat_decides_between_pages_of_which_the_queries_say_little(
    scores: dict[int, float], hot: list[int], chosen: list[int]
) -> None:
    server = Server(budget=0.125)  # 5 of 40 pages, 1 of them recent
    memory = server.memory(40)
    server.push_off()
    server.ledger.heat.select(memory[hot])
    server.wanted.values = scores
    req = resident(server, memory, budget=0.1)
    server.admit(req)
    (read,) = server.extend(req)
    assert positions(req, read.here, server) == chosen


def test_a_choice_that_fails_leaves_what_was_looked_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    memory = server.memory(40)
    server.push_off()
    server.wanted.values = {7: 3.0}
    bad, good = (resident(server, memory, rid=rid, row=row, budget=0.1) for row, rid in enumerate(("bad", "good"), 1))
    assert server.admit(bad, good) == [RESIDENT, RESIDENT]
    choose = prefill_module.choose

    def broken_once(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(prefill_module, "choose", choose)
        raise RuntimeError("injected")

    batch, new_pages = server.batch({}, bad, good)
    server.runtime.before_forward(batch_of(batch), new_pages)
    monkeypatch.setattr(prefill_module, "choose", broken_once)
    with caplog.at_level(logging.ERROR, logger="sglang_lsa"):
        server.runtime.choose_resident()
    assert "choosing a prefix for bad failed; it reads what it looked at" in caplog.text
    assert (server.lookahead.counts.failures, server.runtime.requests["bad"].story.failures) == (1, 1)
    assert server.runtime.requests["good"].story.failures == 0
    reads = [server.look_at(reading) for reading in server.readings]
    assert positions(bad, reads[0].here, server) == [0, 39]
    assert positions(good, reads[1].here, server) == [0, 7, 39], "the others get theirs"
    assert server.held(bad) == [0, 39, 40, 41]
    assert not server.runtime.step.looks


@pytest.mark.parametrize(("lead", "lag"), [(0, 0), (3, 2)], ids=["cpu", "gpu"])
def test_a_choice_that_cannot_be_brought_in_is_not_read(lead: int, lag: int) -> None:
    """The pool is tight, the first look has hot pages, and its queries ask for others: what is read is what is held."""
    server = Server(budget=0.2)
    server.lookahead.clock.lead, server.lookahead.clock.lag = lead, lag
    memory = server.memory(40)
    server.push_off()
    for page in memory[6:14]:
        server.ledger.heat.select(np.array([page]))
    assert server.pager.hold("earlier", memory[6:14])
    server.pager.forget("earlier")
    server.neighbour(12)
    server.wanted.values = {page: 10.0 - page / 100 for page in (20, 22, 24, 26, 28, 30)}
    req = resident(server, memory, budget=0.2)
    assert server.admit(req) == [RESIDENT]
    (read,) = server.extend(req)
    assert read.look is not None
    looked, chosen = positions(req, read.look, server), positions(req, read.here, server)
    assert set(looked) < set(chosen), "pages that the look reads cannot be given up while its pass runs"
    assert {20, 22} <= set(chosen) and len(chosen) <= 8
    assert server.lookahead.counts.failures == 0
    for _ in range(3):
        found = server.decode(req)
        assert set(found) <= set(server.slots(req, 0, req.computed))


def test_what_the_rest_of_a_prompt_needs_is_not_taken_for_its_prefix() -> None:
    """It let go of pages that another request had begun to share: less than a whole set can be had."""
    server = Server(budget=0.3, physical=24)
    memory = server.memory(40)
    server.push_off()
    server.wanted.values = {position: 2.0 for position in (10, 11, 12, 13, 14, 15, 16, 17, 18)}
    req = resident(server, memory, own=8, budget=0.3)
    assert server.admit(req) == [RESIDENT]
    server.extend(req, a=44 * PAGE_SIZE)
    server.neighbour(memory[10:19])
    server.neighbour(max(0, server.pager.unpromised_pages))
    server.wanted.values = {position: 2.0 for position in (20, 21, 22, 23, 24, 25, 26, 27, 28)}
    (read,) = server.extend(req, a=46 * PAGE_SIZE)
    assert len(positions(req, read.here, server)) <= 12 + 4
    server.extend(req)
    assert (server.lookahead.counts.failures, owed(server.pager)) == (0, {}), "none of its own pages was missing"


def test_what_a_prompt_still_needs_is_its_own_while_its_pass_runs() -> None:
    """Another request's refresh, between the beginning and the end of the pass, takes none of it."""
    server = Server(budget=1.0)
    req = server.request(20 * PAGE_SIZE)
    assert server.admit(req) == [IN_PLACE]
    batch, new_pages = server.batch({"a": 4 * PAGE_SIZE}, req)
    server.runtime.before_forward(batch_of(batch), new_pages)
    assert owed(server.pager) == {"a": 16}
    others = server.allocate(5)
    assert not server.pager.hold_if_spare("other", others, 0)
    assert server.pager.hold_if_spare("other", others[:4], 0)


def test_a_policy_that_fails_leaves_the_most_recent_pages() -> None:
    server = Server(budget=0.25)
    memory = server.memory(20)
    server.push_off()
    del server.lookahead.scorer.policies["quest"]  # type: ignore[attr-defined]
    req = resident(server, memory)
    server.admit(req)
    (read,) = server.extend(req)
    assert positions(req, read.here, server) == [0, 16, 17, 18, 19]
    assert (server.lookahead.counts.failures, server.lookahead.counts.fallbacks > 0) == (0, True)


def test_chunks_of_a_prompt_over_a_resident_prefix() -> None:
    """Each looks first at what the one before chose; its own pages it reads whole."""
    server = Server()
    memory = server.memory(40)
    server.push_off()
    server.wanted.values = {7: 3.0, 21: 2.0}
    req = resident(server, memory, own=7)
    assert server.admit(req) == [RESIDENT]
    demand = owed(server.pager)["a"]
    assert demand == server.lookahead.rules.set_pages(40, 0.5) + 7 + 1
    (first,) = server.extend(req, a=44 * PAGE_SIZE)
    assert server.held(req) == [0, 7, 21, 39, 40, 41, 42, 43]
    assert owed(server.pager) == {"a": demand - 8}
    server.wanted.values = {8: 3.0, 21: 2.0}
    (second,) = server.extend(req, a=46 * PAGE_SIZE)
    assert first.look is not None and second.look is not None
    assert positions(req, first.here, server) == [0, 7, 21, 39]
    assert positions(req, second.look, server) == [0, 7, 21, 39, 40, 41, 42, 43]
    assert positions(req, second.here, server) == [0, 7, 8, 21, 39, 40, 41, 42, 43], "and what it looked at"
    assert server.held(req) == [0, 7, 8, 21, 39, 40, 41, 42, 43, 44, 45]
    assert owed(server.pager) == {"a": demand - 11}
    server.extend(req)
    assert owed(server.pager) == {}
    assert server.prefill.resident_prompts == 1


def test_two_questions_about_one_memory() -> None:
    server = Server()
    memory = server.memory(20)
    server.push_off()
    server.wanted.values = {7: 3.0, 11: 2.0}
    first = resident(server, memory, 1, "first", 1, budget=0.2)
    second = resident(server, memory, 2, "second", 2, budget=0.2)
    assert server.admit(first, second) == [RESIDENT, RESIDENT]
    reads = server.extend(first, second)
    assert [positions(req, read.here, server) for req, read in zip((first, second), reads, strict=True)] == [
        [0, 7, 11, 19],
        [0, 7, 11, 19],
    ]
    assert server.ledger.recalls == 4
    assert server.prefill.resident_prompts == 2


def test_until_its_first_window_a_request_reads_what_its_prompt_read() -> None:
    server = Server()
    memory = server.memory(40)
    server.push_off()
    server.wanted.values = {7: 3.0, 21: 2.0}
    req = resident(server, memory)
    server.admit(req)
    server.lookahead.clock.lead, server.lookahead.clock.lag = 3, 2  # as on a GPU
    server.extend(req)
    request = server.runtime.requests["a"]
    assert (request.resident.positions.tolist(), request.resident.tail_start) == ([0, 7, 21, 39], 40)
    assert request.resident.ranks is not None and request.resident.ranks.tolist() == [np.inf, 3.0, 2.0, np.inf]
    server.wanted.values = {}
    found = server.decode(req)
    assert found[: 4 * PAGE_SIZE] == [
        slot for page in memory[[0, 7, 21, 39]] for slot in range(page * 64, page * 64 + 64)
    ]
    assert found[4 * PAGE_SIZE :] == server.slots(req, 40 * PAGE_SIZE, req.computed)
