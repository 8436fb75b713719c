"""Pager: the ledger's decisions on real memory; every byte comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import owed
from simulated_gpu import LAYERS

from sglang_lsa.memory.ledger import LedgerError

PAGE, HEADS, DIM = 4, 2, 3
PHYSICAL, VIRTUAL = 4, 10


class Pages(Server):
    """Pages of an odd shape, all of them handed out; their content is random, but the same every time."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(PHYSICAL, VIRTUAL, PAGE, HEADS, DIM, dtype)
        self.allocate(VIRTUAL)
        generator = torch.Generator().manual_seed(0)
        self.random = torch.randn(LAYERS, 2, (VIRTUAL + 1) * PAGE, HEADS, DIM, generator=generator)

    def content(self, slots: torch.Tensor) -> torch.Tensor:
        return self.random[:, :, slots]

    def finish(self, copies: int) -> None:
        """So many more copies are done, oldest first, those to the mirror before those to the device."""
        stores = min(copies, len(self.gpu.storing))
        self.gpu.finish(stores, copies - stores)


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


# --- copies that take time, as on a GPU ------------------------------------------------------------------------------


def late_pages() -> Pages:
    server = Pages()
    server.late()
    return server


def test_a_page_is_mirrored_when_its_copy_is_done() -> None:
    server = late_pages()
    pager = server.pager
    server.use("a", 1, 2)
    pager.forget("a")
    assert not pager.ledger.is_mirrored([1, 2]).any()
    assert pager.unpromised_pages == PHYSICAL - 2
    pager.poll()
    assert pager.unpromised_pages == PHYSICAL - 2
    server.finish(1)
    assert pager.ledger.is_mirrored([1, 2]).all()
    assert pager.unpromised_pages == PHYSICAL
    assert pager.stored_pages == 2


def test_what_is_stored_later_is_named_by_the_call() -> None:
    """The caller may use its array for something else."""
    server = late_pages()
    pager = server.pager
    assert pager.hold("a", [1, 2])
    pages = np.array([1])
    pager.store(pages)
    pages[0] = 2
    server.finish(1)
    assert pager.ledger.is_mirrored([1, 2]).tolist() == [True, False]


@pytest.mark.parametrize("again", [False, True], ids=["released", "handed out again"])
def test_a_copy_of_a_page_that_is_gone_mirrors_nothing(again: bool) -> None:
    server = late_pages()
    pager = server.pager
    server.use("a", 1, 2)
    pager.forget("a")
    pager.ledger.release([1])
    if again:
        pager.ledger.allocate([1])
        assert pager.hold("b", [1])
    pager.ledger.check()
    server.finish(1)
    assert pager.ledger.is_mirrored([1, 2]).tolist() == [False, True]
    pager.ledger.check()
    assert pager.ledger.obtainable_pages == PHYSICAL - again


def test_a_page_whose_place_moved_during_its_copy_is_not_mirrored() -> None:
    server = late_pages()
    pager = server.pager
    server.use("x", 1)
    server.finish(1)
    pager.forget("x")
    server.use("a", 2, 3, 4, 5)  # evicts 1
    pager.ledger.substitute("a", [2], [1])
    pager.ledger.check()
    server.finish(1)
    assert pager.ledger.is_mirrored([1, 2, 3, 4, 5]).tolist() == [True, False, True, True, True]
    pager.ledger.check()


def recalled_late(others: int = 0) -> Pages:
    """Page 1 was evicted and is held again; its content is on its way, after so many recalls that are nobody's."""
    server = late_pages()
    pager = server.pager
    for _ in range(others):
        server.gpu.recall(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), lambda: None)
        server.gpu.arrive()
    server.use("a", 1)
    pager.forget("a")
    server.finish(1)
    server.use("b", 2, 3, 4, 5)
    pager.forget("b")
    server.finish(1)
    assert pager.hold("c", [1, 5])
    return server


def test_a_recalled_page_arrives_when_its_copy_is_done() -> None:
    server = recalled_late()
    pager = server.pager
    pages = np.array([1, 5])
    assert not pager.arrived(pages)
    assert pager.arrived(pages[1:])
    assert server.gpu.recalled_pages == 0
    server.finish(1)
    assert pager.arrived(pages)
    assert server.gpu.recalled_pages == 1
    assert pager.late_pages == 0
    server.assert_content(1)


def test_required_pages_are_there_before_the_next_kernel() -> None:
    server = recalled_late()
    pager = server.pager
    pager.require(np.array([5]))
    assert server.gpu.calls["before_next_kernel"] == 0
    pager.require(np.array([1, 5]))
    assert server.gpu.calls["before_next_kernel"] == 1
    server.kernel()
    server.assert_content(1)
    pager.poll()
    pager.require(np.array([1, 5]))
    assert server.gpu.calls["before_next_kernel"] == 1


def test_recalls_of_others_are_not_taken_for_ones_of_pages() -> None:
    """Compiling kernels at start recalls a padding page twice; the next recall is the third."""
    server = recalled_late(others=2)
    server.pager.require(np.array([1]))
    server.kernel()
    server.assert_content(1)


def test_a_recall_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    server = recalled_late()
    pager = server.pager
    server.gpu.arrive()
    pager.forget("c")
    server.use("b", 2, 3, 4, 5)
    pager.forget("b")
    server.finish(1)
    assert not pager.ledger.v2p[1]
    before = pager.ledger.obtainable_pages

    def fails(*_: object) -> int:
        raise MemoryError("no memory for page ids")

    with monkeypatch.context() as broken:
        broken.setattr(server.gpu, "recall", fails)
        with pytest.raises(MemoryError):
            pager.hold("d", [1, 5])
    assert not pager.ledger.v2p[1] and not pager.arrived(np.array([1]))
    pager.ledger.check()
    pager.forget("d")
    assert pager.ledger.obtainable_pages == before
    assert pager.hold("e", [1])
    pager.require(np.array([1]))
    server.kernel()
    server.assert_content(1)


def test_pages_for_a_coming_window_are_counted_and_late_ones_too() -> None:
    server = recalled_late()
    pager = server.pager
    assert pager.prefetched_pages == 0  # page 1 was wanted at once
    pager.forget("c")
    server.finish(1)
    assert pager.hold_if_spare("c", np.array([1, 5]), 0)
    assert pager.prefetched_pages == 0  # both are there
    pager.count_late(np.array([1, 5]))
    assert pager.late_pages == 0
    assert pager.hold_if_spare("c", np.array([2]), 0)
    assert pager.prefetched_pages == 1
    pager.count_late(np.array([1, 2]))
    assert pager.late_pages == 1


def test_a_page_that_is_on_its_way_is_recalled_once() -> None:
    server = recalled_late()
    pager = server.pager
    assert pager.hold("d", [1])
    assert len(server.gpu.recalling) == 1
    pager.forget("c")
    pager.forget("d")
    assert pager.ledger.obtainable_pages == PHYSICAL - 1
    assert pager.hold("e", [1])
    assert len(server.gpu.recalling) == 1
    server.finish(1)
    server.assert_content(1)


def test_the_place_of_a_page_released_on_its_way_is_not_reused_before_it_came() -> None:
    server = recalled_late()
    pager = server.pager
    place = int(pager.v2p[1])
    pager.forget("c")
    pager.ledger.release([1])
    assert pager.hold("d", [6, 7, 8])
    assert place not in pager.v2p[torch.tensor([6, 7, 8])].tolist()
    assert not pager.hold("d", [9])
    server.finish(1)
    assert pager.hold("d", [9])
    assert int(pager.v2p[9]) == place
    pager.ledger.check()


def test_settle_waits_for_copies() -> None:
    server = recalled_late()
    pager = server.pager
    server.use("c", 6)
    pager.settle()
    assert (server.gpu.storing, server.gpu.recalling) == ([], [])
    assert pager.ledger.is_mirrored([6]).all()
    assert pager.arrived(np.array([1, 5, 6]))


def test_reset_waits_for_copies() -> None:
    server = recalled_late()
    pager = server.pager
    pager.forget("c")
    pager.reset()
    assert (server.gpu.storing, server.gpu.recalling) == ([], [])
    assert pager.unpromised_pages == PHYSICAL


def test_forward_passes_are_done_when_they_return() -> None:
    server = Pages()
    pager = server.pager
    server.use("a", 1)
    number = pager.ledger.forward_started()
    pager.forget("a")
    assert pager.unpromised_pages == PHYSICAL - 1
    pager.forward_queued(number)
    assert pager.unpromised_pages == PHYSICAL


def test_flush_leaves_nothing_to_tell() -> None:
    server = Pages()
    pager = server.pager
    assert pager.hold("a", [7])
    pager.flush()
    assert pager.ledger.take_moved().tolist() == []
    assert int(pager.v2p[7]) > 0


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
