"""Prefill: what each pass of a prompt holds, reads and lets go, in a runtime whose model writes slot numbers as KV."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import pytest
import torch
from harness import NONE, Wanted, request
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import owed
from simulated_gpu import LAYERS

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine import prefill as prefill_module
from sglang_lsa.engine.prefill import DevicePoolFull
from sglang_lsa.engine.reading import IN_PLACE, RESIDENT, STREAMED, Reading
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.engine.step import IDLE
from sglang_lsa.memory.pages import pages_complete, pages_spanned
from sglang_lsa.patches.batch import batch_of
from sglang_lsa.patches.requests import choose, judge, key_of, promise, request_gone
from sglang_lsa.serve.one_request import collect, formatted

PHYSICAL, VIRTUAL = 24, 250
CHUNK = 4 * PAGE_SIZE


@dataclass
class Read:
    """What one request's pass read before its own tokens, by what was found there: virtual slots."""

    here: list[int]
    streamed: list[int] = field(default_factory=list)
    look: list[int] | None = None
    """What a first look read, for a resident prefix."""

    @property
    def pages(self) -> list[int]:
        return sorted({slot // PAGE_SIZE for slot in (*self.here, *self.streamed)})


class Server(harness.Server):
    """A runtime, and as much of SGLang as it takes: allocation of pages, batches, and a model that writes its KV."""

    def __init__(
        self, chunk: int | None = CHUNK, physical: int = PHYSICAL, page: int = PAGE_SIZE, **options: object
    ) -> None:
        super().__init__(physical, VIRTUAL, page)
        defaults = {"budget": 0.5, "min_pages": 1, "min_context": CHUNK, "window": 8, "staging_pages": 3}
        config = LSAConfig(**{**defaults, "recent_pages": 1, "prompt_pages": 0, "debug": True, **options})
        table = torch.zeros((9, VIRTUAL * self.pager.page), dtype=torch.int32)
        self.runtime = LSARuntime(config, self.pager, table, 1, 1.0, chunk)
        self.lookahead, self.prefill, self.admission = (
            self.runtime.lookahead,
            self.runtime.prefill,
            self.runtime.admission,
        )
        self.wanted = Wanted()
        self.lookahead.scorer.policies["quest"] = self.wanted  # type: ignore[index]
        self.chunk = chunk
        self.step = IDLE
        """The last prefill pass, as it was run in the end."""

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Of the pass being queued."""
        assert self.runtime.step.readings is not None
        return self.runtime.step.readings

    def neighbour(self, pages: int | np.ndarray) -> None:
        """Somebody else needs these pages, or so many new ones, on the device."""
        self.hold("neighbour", pages)
        self.runtime.requests["neighbour"] = Request("neighbour", 8, Asked("quest", 1.0, True))

    def look_at(self, reading: Reading) -> Read:
        here = self.found_at(reading.slots(self.ledger.v2p), prefill=True)
        return Read(here, self.found_in_mirror(reading.streamed))

    def slots(self, req: Any, start: int, end: int) -> list[int]:
        return self.prefill.req_to_token[req.req_pool_idx, start:end].tolist()

    # -- batches

    def request(self, tokens: int, prefix: np.ndarray = NONE, rid: str = "a", row: int = 1, **lsa: object) -> Any:
        """A prompt of which the radix tree has the pages ``prefix``."""
        req = request(tokens, prefix, rid, self.pager.page, **lsa)
        req.req_pool_idx, req.computed = row, len(prefix) * self.pager.page
        self.prefill.req_to_token[row, : req.computed] = req.prefix_indices
        return req

    def admit(self, *reqs: Any) -> list[str]:
        batch: list[str] = []
        for req in reqs:
            admitted = choose(self.admission, req, len(batch), batch, self.chunk)
            assert admitted is not None
            promise(self.admission, req, admitted)
            batch.append(admitted.how)
        return batch

    def batch(self, ends: dict[str, int], *reqs: Any) -> tuple[Any, np.ndarray]:
        """A prefill batch, up to so many tokens of each request (by default all), and its new pages."""
        lengths = [ends.get(req.rid, len(req.full_untruncated_fill_ids)) for req in reqs]
        taken = []
        for req, end in zip(reqs, lengths, strict=True):
            first, pages = pages_spanned(req.computed, self.pager.page), pages_spanned(end, self.pager.page)
            new = self.allocate(pages - first)
            taken.append(new)
            row = self.prefill.req_to_token[req.req_pool_idx]
            row[first * self.pager.page : pages * self.pager.page] = self.slots_of(new)
        middle = [req for req, end in zip(reqs, lengths, strict=True) if end < len(req.full_untruncated_fill_ids)]
        batch = SimpleNamespace(
            reqs=list(reqs),
            prefix_lens=[req.computed for req in reqs],
            seq_lens_cpu=torch.tensor(lengths),
            forward_mode=SimpleNamespace(is_extend=lambda: True, is_decode=lambda: False),
            chunked_req=middle[-1] if middle else None,
        )
        return batch, np.concatenate((NONE, *taken))

    def extend(self, *reqs: Any, **ends: int) -> list[Read]:
        """One prefill pass; returns what each request read before its own tokens."""
        return self.run(*self.batch(ends, *reqs))

    def run(self, batch: Any, new_pages: np.ndarray) -> list[Read]:
        number = self.runtime.before_forward(batch_of(batch), new_pages)
        looks: dict[int, list[int]] = {}
        if self.runtime.step.looks:
            looks = {index: self.look_at(self.readings[index]).here for index in self.runtime.step.looks}
            self.runtime.choose_resident()
        reads, self.step = [], self.runtime.step
        for index, (req, end) in enumerate(zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=True)):
            reading = (
                self.step.readings[index]
                if self.step.readings is not None
                else Reading.all_of(
                    self.runtime.requests[req.rid].pages[: pages_spanned(req.computed, self.pager.page)],
                    req.computed,
                    self.pager.page,
                )
            )
            reads.append(self.look_at(reading))
            reads[-1].look = looks.get(index)
            self.write(self.slots(req, req.computed, end))
            req.computed = end
        staged = self.step.staged
        assert (staged is not None) == any(read.streamed for read in reads)
        if staged is not None:  # as attention does
            assert sum(staged.sizes) == len(reads[0].streamed)
            layers = [torch.cat([torch.stack(block) for block in staged.layer(layer)], 1) for layer in range(LAYERS)]
            assert self.recognized(torch.stack(layers)) == reads[0].streamed
        self.runtime.after_forward(number)
        return reads

    def decode(self, req: Any) -> list[int]:
        """One decode step; returns the virtual slots that it reads."""
        assert self.runtime.can_decode([req.computed])
        tokens = req.computed + 1
        new = self.allocate(int(tokens % self.pager.page == 1))
        row = self.prefill.req_to_token[req.req_pool_idx]
        row[req.computed : req.computed + len(new) * self.pager.page] = self.slots_of(new)
        batch = SimpleNamespace(
            reqs=[req],
            seq_lens_cpu=torch.tensor([tokens]),
            forward_mode=SimpleNamespace(is_extend=lambda: False, is_decode=lambda: True),
        )
        number = self.runtime.before_forward(batch_of(batch), new)
        self.write(self.slots(req, req.computed, tokens))
        table, index = self.lookahead.sets.table, req.req_pool_idx
        places = table.pages[index, : int(table.count[index])] * self.pager.page
        read = (places[:, None] + torch.arange(self.pager.page)).flatten().long()
        tail = torch.tensor(self.slots(req, int(table.tail_start[index]) * self.pager.page, tokens), dtype=torch.int64)
        found = self.found_at(torch.cat((read, self.places(tail))))
        req.computed = tokens
        self.runtime.after_forward(number)
        return found

    # -- what tests look at

    def held(self, req: Any) -> list[int]:
        """Positions of the request's pages that it holds."""
        held = self.ledger.held_by(req.rid)
        return [place for place, page in enumerate(self.runtime.requests[req.rid].pages.tolist()) if page in held]


# --- in place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, PAGE_SIZE, 5 * PAGE_SIZE - 1, 5 * PAGE_SIZE, 5 * PAGE_SIZE + 1])
def test_a_prompt_in_place(tokens: int) -> None:
    server = Server(budget=1.0)
    req = server.request(tokens)
    assert server.admit(req) == [IN_PLACE]
    assert server.extend(req) == [Read([])]
    assert server.held(req) == list(range(pages_spanned(tokens, PAGE_SIZE)))
    assert owed(server.pager) == {}, "what was promised is held"
    assert server.step.readings is None, "backends read everything"
    assert server.ledger.host_pages == pages_complete(tokens, PAGE_SIZE)
    request = server.runtime.requests["a"]
    assert (request.tokens, request.prompt_tokens, request.story.prefill) == (tokens, tokens, IN_PLACE)
    assert (server.prefill.prompt_tokens, server.prefill.radix_hit_tokens) == (tokens, 0)


def test_a_prompt_in_place_brings_in_its_prefix() -> None:
    server = Server(budget=1.0)
    prefix = server.memory(8)
    server.push_off()
    req = server.request(10 * PAGE_SIZE, prefix)
    server.admit(req)
    (read,) = server.extend(req)
    assert read == Read(server.slots(req, 0, 8 * PAGE_SIZE))
    assert server.held(req) == list(range(10))
    assert server.ledger.recalls == 8
    assert (server.prefill.prompt_tokens, server.prefill.radix_hit_tokens) == (10 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert server.prefill.streamed_passes == 0


def test_a_pass_does_not_wait_for_all_layers_of_what_it_brings_in() -> None:
    server = Server(budget=1.0)
    prefix = server.memory(8)
    server.push_off()
    gpu = server.late()
    req = server.request(10 * PAGE_SIZE, prefix)
    server.admit(req)
    (read,) = server.extend(req)
    assert read.here == server.slots(req, 0, 8 * PAGE_SIZE)
    assert (gpu.calls["gate_layers"], gpu.calls["wait"]) == (1, 0)
    assert [recall.layered for recall in gpu.recalls] == [True]


def test_a_prompt_in_place_in_chunks() -> None:
    """What it still needs stays promised to it, so that nothing overtakes it."""
    server = Server(budget=1.0)
    req = server.request(11 * PAGE_SIZE)
    assert server.admit(req) == [IN_PLACE]
    assert owed(server.pager) == {"a": 11}
    for end, promised in ((4 * PAGE_SIZE, 7), (7 * PAGE_SIZE + 20, 3), (9 * PAGE_SIZE, 2)):
        begun = req.computed
        (read,) = server.extend(req, a=end)
        assert read == Read(server.slots(req, 0, begun))
        assert server.held(req) == list(range(pages_spanned(end, PAGE_SIZE)))
        assert owed(server.pager) == {"a": promised}
        assert server.lookahead.counts.refreshes == 0
    server.extend(req)
    assert server.held(req) == list(range(11))
    assert owed(server.pager) == {}
    assert server.lookahead.counts.refreshes == 1
    assert server.prefill.prompt_tokens == 11 * PAGE_SIZE, "counted once"


def test_prompts_of_one_pass_get_their_pages_in_their_order() -> None:
    server = Server(budget=1.0)
    memory = server.memory(3)
    first = server.request(5 * PAGE_SIZE - 7, memory, "first", 1)
    second = server.request(2 * PAGE_SIZE, NONE, "second", 2)
    third = server.request(6 * PAGE_SIZE, memory, "third", 3)
    assert server.admit(first, second, third) == [IN_PLACE] * 3
    reads = server.extend(first, second, third, third=5 * PAGE_SIZE)
    assert [len(read.here) // PAGE_SIZE for read in reads] == [3, 0, 3]
    for req, count in ((first, 5), (second, 2), (third, 5)):
        pages = server.runtime.requests[req.rid].pages
        assert len(pages) == count
        assert pages.tolist() == [slot // PAGE_SIZE for slot in server.slots(req, 0, req.computed)[::PAGE_SIZE]]
        assert server.held(req) == list(range(count))
    assert [request.rid for request in server.step.requests] == ["first", "second", "third"]
    assert owed(server.pager) == {"third": 1}


def test_a_request_reads_all_of_its_pages_until_it_has_a_set() -> None:
    """Its row of the table may still be that of the request before it."""
    server = Server(budget=1.0)
    server.lookahead.sets.table.remap(1, np.array([3, 4]), 5)
    req = server.request(3 * PAGE_SIZE)
    server.admit(req)
    server.extend(req)
    assert (int(server.lookahead.sets.table.count[1]), int(server.lookahead.sets.table.tail_start[1])) == (0, 0)


# --- streamed --------------------------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_pool() -> None:
    """Chunk by chunk: every token before is read once, and only what is not full stays."""
    server = Server()
    server.wanted.values = {30: 2.0, 45: 1.0}
    req = server.request(60 * PAGE_SIZE + 30)
    assert server.admit(req) == [STREAMED]
    assert owed(server.pager) == {"a": 12}
    streamed = 0
    for end in (*range(CHUNK, 60 * PAGE_SIZE + 1, CHUNK), 60 * PAGE_SIZE + 30):
        begun = req.computed
        (read,) = server.extend(req, a=end)
        assert sorted(read.here + read.streamed) == server.slots(req, 0, begun)
        assert read.here == sorted(read.here), "in their order"
        assert len(read.streamed) == max(0, begun + CHUNK - PHYSICAL * PAGE_SIZE) or end > 60 * PAGE_SIZE
        streamed += len(read.streamed) // PAGE_SIZE
        if end < len(req.origin_input_ids):
            assert server.held(req) == []
            assert owed(server.pager) == {"a": 12}
            assert server.ledger.host_pages == end // PAGE_SIZE
            assert server.lookahead.counts.refreshes == 0
    assert server.runtime.staging.staged_pages == streamed == sum(range(4, 40, 4)) + 37
    assert server.prefill.streamed_passes == 10

    request = server.runtime.requests["a"]
    assert (request.story.prefill, request.resident.incomplete) == (STREAMED, False)
    assert owed(server.pager) == {}
    assert request.resident.positions.tolist() == [0, 30, 45]
    assert server.held(req) == [0, 30, 45, 60]
    assert server.ledger.recalls == 2
    pages = [*request.pages[request.resident.positions].tolist(), int(request.pages[60])]
    assert {slot // PAGE_SIZE for slot in server.decode(req)} == set(pages)


def test_a_prompt_that_is_streamed_because_others_hold_the_pool() -> None:
    server = Server()
    server.neighbour(14)
    req = server.request(12 * PAGE_SIZE)
    assert server.admit(req) == [STREAMED]
    for end in (4, 8, 12):
        begun = req.computed
        (read,) = server.extend(req, a=end * PAGE_SIZE)
        assert sorted(read.here + read.streamed) == server.slots(req, 0, begun)
        assert server.ledger.held_by("neighbour") == set(range(1, 15))
    assert len(read.streamed) == 2 * PAGE_SIZE
    assert server.held(req) == server.runtime.requests["a"].resident.positions.tolist()


@pytest.mark.parametrize("ends", [[100], [30, 60, 90], [64, 65, 300, 320, 321], [1]], ids=str)
def test_a_chunk_may_end_within_a_page(ends: list[int]) -> None:
    """Its page has no mirror copy yet, and stays. (The hooks avoid it; SGLang may not always let them.)"""
    server = Server()
    req = server.request(30 * PAGE_SIZE + 11)
    assert server.admit(req) == [STREAMED]
    for end in [*ends, *range(ends[-1] + CHUNK, 30 * PAGE_SIZE, CHUNK)]:
        begun = req.computed
        (read,) = server.extend(req, a=end)
        assert sorted(read.here + read.streamed) == server.slots(req, 0, begun)
        assert server.held(req) == ([end // PAGE_SIZE] if end % PAGE_SIZE else [])
        assert server.ledger.host_pages == end // PAGE_SIZE
        assert owed(server.pager) == {"a": 12 - (end % PAGE_SIZE > 0)}, "what stays counts against what was promised"
    assert server.prefill.streamed_passes > 0
    server.extend(req)
    assert server.held(req)[-1] == 30


def test_a_first_chunk_reads_nothing() -> None:
    server = Server()
    req = server.request(40 * PAGE_SIZE)
    server.admit(req)
    assert server.extend(req, a=CHUNK) == [Read([])]
    assert server.step.readings is None
    assert (server.prefill.streamed_passes, server.runtime.staging.staged_pages) == (0, 0)


def test_what_is_on_the_device_is_read_there() -> None:
    """Nothing is recalled for a prompt that is streamed."""
    server = Server()
    prefix = server.memory(40)  # the last 24 of them are on the device
    req = server.request(42 * PAGE_SIZE + 5, prefix)
    assert server.admit(req) == [STREAMED]
    server.neighbour(5)  # displaces pages of the prefix, but not those that the prompt is about to read
    (read,) = server.extend(req, a=42 * PAGE_SIZE)
    assert read.here == server.slots(req, 21 * PAGE_SIZE + 2 * PAGE_SIZE, 40 * PAGE_SIZE)
    assert read.streamed == server.slots(req, 0, 23 * PAGE_SIZE)
    assert server.ledger.recalls == 0
    assert server.ledger.held_by("a") == frozenset()


def test_pages_read_in_place_stay_until_the_pass_is_queued() -> None:
    server = Server()
    prefix = server.memory(40)
    req = server.request(42 * PAGE_SIZE, prefix)
    server.admit(req)
    batch, new_pages = server.batch({}, req)
    step = server.prefill.begin_pass(batch_of(batch), new_pages)
    assert server.ledger.held_by("a") == set(new_pages.tolist()), "others do not see more room through what it reads"
    assert owed(server.pager) == {"a": 12 - 2}
    server.push_off()
    assert server.ledger.on_device(range(19, 41)).all()
    server.pager.all_queued()
    number = server.ledger.forward_started()
    server.push_off()
    assert server.ledger.on_device(range(19, 41)).all()
    server.pager.forward_queued(number)
    server.push_off()
    assert not server.ledger.on_device(range(19, 41)).any()
    assert step.readings is not None
    assert [len(reading.streamed) for reading in step.readings] == [18]


def test_a_pass_waits_for_what_it_reads_in_place() -> None:
    """A hot page that was sent for when the prompt was admitted is on its way."""
    server = Server()
    prefix = server.memory(40)
    server.push_off()
    server.ledger.heat.select(prefix[[3, 30]])
    gpu = server.late()
    req = server.request(42 * PAGE_SIZE, prefix)
    server.admit(req)
    assert server.ledger.arriving(prefix[[3, 30]]).all()
    (read,) = server.extend(req)
    assert read.here == [*server.slots(req, 3 * 64, 4 * 64), *server.slots(req, 30 * 64, 31 * 64)]
    assert gpu.calls["gate_layers"] == 1


def test_without_a_streamed_prompt_nothing_is_staged_any_more() -> None:
    server = Server()
    prefix = server.memory(40)
    req = server.request(42 * PAGE_SIZE, prefix)
    server.admit(req)
    server.extend(req)
    assert server.step.staged is not None
    other = server.request(PAGE_SIZE, NONE, "b", 2)
    server.admit(other)
    server.extend(other)
    assert (server.step.staged, server.step.readings) == (None, None)


# --- over a resident prefix ------------------------------------------------------------------------------------------


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


# --- a rid that is used again ----------------------------------------------------------------------------------------


def test_a_rid_is_used_again_while_its_first_request_is_still_here() -> None:
    """A client hung up and asks again: SGLang's HTTP process has forgotten the first, its scheduler has not."""
    server = Server(budget=1.0)
    first, second = server.request(5 * PAGE_SIZE, row=1), server.request(6 * PAGE_SIZE, row=2)
    for req in (first, second):
        assert server.admit(req) == [IN_PLACE]
        server.extend(req)
    keys = [key_of(first), key_of(second)]
    assert keys == ["a", "a (2)"]
    assert [server.runtime.requests[key].rid for key in keys] == ["a", "a"]
    for _ in range(3):
        for req in (first, second):
            assert sorted(server.decode(req)) == server.slots(req, 0, req.computed)
    request_gone(server.runtime, first)
    assert list(server.runtime.requests) == server.ledger.holders() == ["a (2)"]
    assert sorted(server.decode(second)) == server.slots(second, 0, second.computed)
    third = server.request(2 * PAGE_SIZE, row=3)
    server.admit(third)
    assert key_of(third) == "a"
    request_gone(server.runtime, server.request(PAGE_SIZE, row=4))  # aborted before it was admitted
    assert sorted(server.runtime.admission.admitted) == ["a", "a (2)"]
    server.runtime.check()


# --- what is remembered ----------------------------------------------------------------------------------------------


def told(server: Server) -> dict[str, Any]:
    """What is told of the request that finished last."""
    rid = server.runtime.finished[-1].summary["rid"]
    return formatted(collect(server.runtime, rid))["finished"][-1]


def test_the_sets_of_a_finished_request_can_be_given_to_another() -> None:
    """To a streamed prompt, by another server; it reads the same pages and needs no scores."""
    first = Server()
    first.wanted.values = {30: 2.0, 45: 1.0}
    seen = []
    for server, lsa in ((first, {}), (Server(), {"sets": ""})):
        if "sets" in lsa:
            lsa = {"sets": told(first)["sets"]}
            server.wanted.score = lambda *_: pytest.fail("scored")  # type: ignore[method-assign]
        req = server.request(50 * PAGE_SIZE, **lsa)
        assert server.admit(req) == [STREAMED]
        while req.computed < 50 * PAGE_SIZE:
            server.extend(req, a=min(50 * PAGE_SIZE, req.computed + CHUNK))
        seen.append([server.decode(req) for _ in range(30)])
        request_gone(server.runtime, req)
    assert seen[0] == seen[1]
    done, again = told(first), told(server)
    assert done["sets"] == again["sets"] != ""
    assert (done["prefill"], done["prompt_tokens"], done["number"]) == ("streamed", 50 * PAGE_SIZE, 1)
    assert done["history"][0] == [0, 30, 45, 49]
    assert len(done["history"]) == len(done["sets"].split(";")) >= 4


# --- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "allocated"), [(1, 6), (-1, 4)], ids=["too many", "too few"])
def test_new_pages_that_do_not_fit_the_batch_are_an_error(more: int, allocated: int) -> None:
    server = Server(budget=1.0)
    first, second = server.request(3 * PAGE_SIZE, NONE, "first", 1), server.request(100, NONE, "second", 2)
    server.admit(first, second)
    batch, new_pages = server.batch({}, first, second)
    new_pages = np.append(new_pages, server.allocate(1)) if more > 0 else new_pages[:-1]
    with pytest.raises(RuntimeError, match=f"LSA: SGLang allocated {allocated} pages for a batch that needs 5"):
        server.prefill.begin_pass(batch_of(batch), new_pages)


def test_a_page_that_must_be_on_the_device_and_cannot_be() -> None:
    server = Server()
    server.neighbour(PHYSICAL - 2)
    with pytest.raises(DevicePoolFull) as full:
        server.prefill.hold("a", server.allocate(3))
    assert str(full.value) == (
        "LSA: the device pool (24 pages, 22 held) cannot take 3 pages of a; "
        "admission should have prevented this, please report it"
    )
    assert server.ledger.held_by("a") == frozenset()
    server.ledger.check()


def test_what_is_in_flight_is_waited_for_before_that() -> None:
    server = Server()
    gpu = server.late()
    pages = server.allocate(PHYSICAL)
    assert server.pager.hold("done", pages)
    server.pager.store(pages)
    server.pager.forget("done")
    new = server.allocate(3)
    server.prefill.hold("a", new)
    assert server.ledger.held_by("a") == set(new.tolist())
    assert gpu.calls["wait"] == 1
    server.prefill.hold("a", server.allocate(1))
    assert gpu.calls["wait"] == 1


# --- any prompt ------------------------------------------------------------------------------------------------------


@settings(derandomize=True, database=None, deadline=None, max_examples=120)
@given(
    page=st.sampled_from([16, 64, 256]),
    physical=st.integers(4, 30),
    chunk_pages=st.none() | st.integers(1, 20),
    pages=st.floats(0, 70),
    cached=st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0]),
    budget=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    prefill=st.sampled_from(["exact", "resident"]),
    steps=st.integers(1, 3),
)
def test_an_idle_server_prefills_whatever_it_does_not_refuse(
    page: int,
    physical: int,
    chunk_pages: int | None,
    pages: float,
    cached: float,
    budget: float,
    prefill: str,
    steps: int,
) -> None:
    """To the end, and decodes; exact prompts read every token before each pass once, whatever is where."""
    chunk, tokens = chunk_pages and chunk_pages * page, max(1, int(pages * page))
    min_context = min(256, physical * page // 2)
    server = Server(chunk, physical, page, budget=budget, prefill=prefill, min_context=min_context, min_pages=4)
    server.wanted.values = {3 * position: 1.0 + position for position in range(10)}
    memory = server.memory(int((tokens - 1) // page * cached))
    req = server.request(tokens, memory)
    if judge(server.admission, req) is not None:
        return
    (how,) = server.admit(req)
    while req.computed < tokens:
        most = min(chunk or tokens, server.admission.admitted[key_of(req)].chunk_tokens or tokens)
        begun = req.computed
        (read,) = server.extend(req, a=min(tokens, begun + most))
        if how != RESIDENT:
            assert sorted(read.here + read.streamed) == server.slots(req, 0, begun)
        else:
            assert not read.streamed
            assert set(read.here) >= set(server.slots(req, len(memory) * page, begun))
            assert len(read.here) < begun
    assert owed(server.pager) == {}
    for _ in range(steps):
        found = server.decode(req)
        assert len(set(found)) == len(found)
        assert set(found) <= set(server.slots(req, 0, req.computed))
    assert server.lookahead.counts.failures == 0
