"""Prefill of prompts that are read from the host."""

from __future__ import annotations

import pytest
from harness import NONE
from prefill_server import CHUNK, PHYSICAL, Read, Server
from promises import owed

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.reading import STREAMED
from sglang_lsa.patches.batch import batch_of


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
