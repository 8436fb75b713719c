"""Pager: the ledger's decisions on real memory; every byte comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pager_pages import DIM, HEADS, PAGE, VIRTUAL, Pages, late_pages
from promises import owed
from simulated_gpu import LAYERS

from sglang_lsa.memory.ledger import LedgerError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_store_evict_recall_brings_every_byte_back(dtype: torch.dtype) -> None:
    server = Pages(dtype)
    pager = server.pager
    server.use("a", 1, 2, 3)
    pager.forget("a")
    server.use("b", 4, 5, 6, 7)
    assert not pager.v2p[torch.tensor([1, 2, 3])].any()
    pager.forget("b")
    assert pager.hold("c", [3, 1, 2])
    for page in (1, 2, 3):
        server.assert_content(page)
    assert pager.ledger.recalls == 3
    pager.ledger.check()


def test_the_padding_page_is_never_written() -> None:
    server = Pages()
    pager = server.pager
    for start in (1, 5):
        server.use("a", *range(start, start + 4))
        pager.forget("a")
    for piece in pager.layout.pieces:
        assert not piece.buffer[0].any()


def test_a_shared_page_is_recalled_once() -> None:
    server = Pages()
    pager = server.pager
    server.use("a", 1)
    pager.forget("a")
    server.use("b", 2, 3, 4, 5)
    pager.forget("b")
    assert pager.hold("c", [1])
    assert pager.hold("d", [1])
    assert pager.ledger.recalls == 1
    server.assert_content(1)


def test_a_recall_leaves_other_pages_alone() -> None:
    server = Pages()
    pager = server.pager
    server.use("a", 1, 2)
    pager.forget("a")
    server.use("b", 3, 4, 5)
    assert pager.hold("c", [1])
    for page in (1, 3, 4, 5):
        server.assert_content(page)


def test_a_hold_that_fails_changes_nothing() -> None:
    server = Pages()
    pager = server.pager
    server.use("a", 1)
    pager.forget("a")
    server.use("b", 2, 3, 4)
    tensors = [*(piece.buffer for piece in pager.layout.pieces), pager.mirror.pages, pager.v2p]
    memory = [tensor.clone() for tensor in tensors]
    assert not pager.hold("c", [5, 6])
    assert all(torch.equal(before, after) for before, after in zip(memory, tensors, strict=True))
    assert pager.ledger.holders() == ["b"]


def test_a_partly_filled_page_is_never_evicted() -> None:
    server = Pages()
    pager = server.pager
    assert pager.hold("a", [1])
    server.write(server.slots_of([1])[: PAGE - 1])
    pager.forget("a")
    server.use("b", 2, 3, 4)
    pager.forget("b")
    assert pager.unpromised_pages == 3
    assert not pager.hold("c", [5, 6, 7, 8])
    assert pager.hold("c", [5, 6, 7])
    server.assert_content(1, tokens=PAGE - 1)


def test_storing_what_is_not_on_the_device_is_an_error() -> None:
    server = Pages()
    pager = server.pager
    with pytest.raises(LedgerError, match="mirrored without a device copy"):
        pager.store(np.array([1]))


def test_storing_nothing() -> None:
    server = Pages()
    pager = server.pager
    pager.store(np.array([], dtype=np.int64))
    assert pager.stored_pages == 0


def test_stored_pages_are_counted() -> None:
    server = Pages()
    pager = server.pager
    server.use("a", 1, 2)
    assert pager.stored_pages == 2
    assert pager.page_bytes == LAYERS * 2 * PAGE * HEADS * DIM * 4


def test_promised_pages_cannot_be_had() -> None:
    server = Pages()
    pager = server.pager
    assert pager.unpromised_pages == 4
    pager.reservations.promise("a", 3)
    assert pager.unpromised_pages == 1
    pager.forget("a")
    assert pager.unpromised_pages == 4


def test_forget_keeps_what_others_hold() -> None:
    server = Pages()
    pager = server.pager
    server.use("a", 1, 2)
    assert pager.hold("b", [2])
    pager.forget("a")
    pager.forget("a")
    assert pager.ledger.held_by("b") == {2}
    assert pager.unpromised_pages == 3


def test_reset() -> None:
    server = Pages()
    pager = server.pager
    server.use("a", 1, 2)
    pager.reservations.promise("b", 1)
    pager.forget("a")
    pager.reset()
    assert pager.unpromised_pages == 4
    assert not pager.v2p.any()
    pager.ledger.allocate([1])


def test_a_reset_that_is_refused_changes_nothing() -> None:
    server = Pages()
    pager = server.pager
    server.use("a", 1)
    pager.reservations.promise("b", 1)
    with pytest.raises(LedgerError, match="hold pages"):
        pager.reset()
    assert owed(pager) == {"b": 1}


def test_the_table_that_attention_reads_is_the_ledgers() -> None:
    server = Pages()
    pager = server.pager
    assert pager.hold("a", [7])
    assert int(pager.v2p[7]) == int(pager.ledger.v2p[7]) > 0
    assert pager.v2p.dtype == torch.int64


# --- random sequences ------------------------------------------------------------------------------------------------


OPERATIONS = st.lists(st.tuples(st.sampled_from("abc"), st.sets(st.integers(1, VIRTUAL), max_size=3)), max_size=40)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(OPERATIONS)
def test_whatever_requests_do_they_read_what_was_written(operations: list[tuple[str, set[int]]]) -> None:
    """Requests move to other sets of pages at random; new pages are written, mirrored, evicted and recalled."""
    server = Pages()
    pager = server.pager
    written: set[int] = set()
    for holder, pages in operations:
        if not pages:
            pager.forget(holder)
        elif pager.hold(holder, pages):
            pager.ledger.drop(holder, pager.ledger.held_by(holder) - pages)
            for page in pages - written:
                server.write(server.slots_of([page]))
            pager.store(np.array(sorted(pages - written), dtype=np.int64))
            written |= pages
        for page in {page for name in "abc" for page in pager.ledger.held_by(name)}:
            server.assert_content(page)
        pager.ledger.check()


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sets(st.integers(1, VIRTUAL), max_size=3), st.integers(0, 2))))
def test_whatever_is_on_its_way_requests_read_what_was_written(operations: list[tuple[str, set[int], int]]) -> None:
    """The same with copies that end later; forgotten pages are released, and handed out again with other content."""
    server = late_pages()
    pager = server.pager
    written: set[int] = set()
    for holder, pages, done in operations:
        if not pages:
            pager.forget(holder)
        elif pager.hold(holder, pages):
            pager.ledger.drop(holder, pager.ledger.held_by(holder) - pages)
            for page in pages - written:
                server.write(server.slots_of([page]))
            pager.store(np.array(sorted(pages - written), dtype=np.int64))
            written |= pages
        else:
            gone = sorted(page for page in written - pages if not pager.ledger.is_held([page])[0])
            pager.ledger.release(gone)
            pager.ledger.allocate(gone)
            written.difference_update(gone)
        server.finish(done)
        for page in {page for name in "abc" for page in pager.ledger.held_by(name)}:
            if pager.arrived(np.array([page])):
                server.assert_content(page)
        pager.ledger.check()
    pager.settle()
    for page in {page for name in "abc" for page in pager.ledger.held_by(name)}:
        server.assert_content(page)
