"""Pager: the ledger's decisions on real memory; every byte comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import owed

from sglang_lsa.radix_ext.ledger import LedgerError
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.radix_ext.transfer import Finished, HostTransfer

LAYERS, PAGE, HEADS, DIM = 2, 4, 2, 3
PHYSICAL, VIRTUAL = 4, 10


def make_pager(dtype: torch.dtype = torch.float32) -> Pager:
    keys = [torch.zeros((PHYSICAL + 1) * PAGE, HEADS, DIM, dtype=dtype) for _ in range(LAYERS)]
    values = [torch.zeros_like(buffer) for buffer in keys]
    pager = Pager(keys, values, VIRTUAL, PAGE)
    pager.ledger.allocate(range(1, VIRTUAL + 1))
    return pager


def slots(pager: Pager, page: int) -> torch.Tensor:
    place = int(pager.v2p[page])
    assert place, f"page {page} is not on the device"
    return torch.arange(place * PAGE, (place + 1) * PAGE)


def content(page: int, tokens: int = PAGE) -> list[torch.Tensor]:
    """What this test writes to a page, ``[2 * layers][tokens, heads, dim]``; random, but the same every time."""
    generator = torch.Generator().manual_seed(page)
    return [torch.randn(PAGE, HEADS, DIM, generator=generator)[:tokens] for _ in range(2 * LAYERS)]


def write(pager: Pager, page: int, tokens: int = PAGE) -> None:
    for buffer, values in zip([*pager.keys, *pager.values], content(page, tokens), strict=True):
        buffer[slots(pager, page)[:tokens]] = values.to(buffer.dtype)


def assert_content(pager: Pager, page: int, tokens: int = PAGE) -> None:
    for buffer, values in zip([*pager.keys, *pager.values], content(page, tokens), strict=True):
        assert torch.equal(buffer[slots(pager, page)[:tokens]], values.to(buffer.dtype))


def use(pager: Pager, holder: str, *pages: int) -> None:
    """A request prefills ``pages``: they are written and mirrored."""
    assert pager.hold(holder, pages)
    for page in pages:
        write(pager, page)
    pager.store(np.array(pages))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_store_evict_recall_brings_every_byte_back(dtype: torch.dtype) -> None:
    pager = make_pager(dtype)
    use(pager, "a", 1, 2, 3)
    pager.forget("a")
    use(pager, "b", 4, 5, 6, 7)
    assert not pager.v2p[torch.tensor([1, 2, 3])].any()
    pager.forget("b")
    assert pager.hold("c", [3, 1, 2])
    for page in (1, 2, 3):
        assert_content(pager, page)
    assert pager.ledger.recalls == 3
    pager.ledger.check()


def test_the_padding_page_is_never_written() -> None:
    pager = make_pager()
    for start in (1, 5):
        use(pager, "a", *range(start, start + 4))
        pager.forget("a")
    for buffer in [*pager.keys, *pager.values]:
        assert not buffer[:PAGE].any()


def test_a_shared_page_is_recalled_once() -> None:
    pager = make_pager()
    use(pager, "a", 1)
    pager.forget("a")
    use(pager, "b", 2, 3, 4, 5)
    pager.forget("b")
    assert pager.hold("c", [1])
    assert pager.hold("d", [1])
    assert pager.ledger.recalls == 1
    assert_content(pager, 1)


def test_a_recall_leaves_other_pages_alone() -> None:
    pager = make_pager()
    use(pager, "a", 1, 2)
    pager.forget("a")
    use(pager, "b", 3, 4, 5)
    assert pager.hold("c", [1])
    for page in (1, 3, 4, 5):
        assert_content(pager, page)


def test_a_hold_that_fails_changes_nothing() -> None:
    pager = make_pager()
    use(pager, "a", 1)
    pager.forget("a")
    use(pager, "b", 2, 3, 4)
    memory = [buffer.clone() for buffer in (*pager.keys, *pager.values, pager.mirror.pages, pager.v2p)]
    assert not pager.hold("c", [5, 6])
    after = [*pager.keys, *pager.values, pager.mirror.pages, pager.v2p]
    # bitwise: the part of the mirror that nobody wrote is whatever the memory held
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(memory, after, strict=True))
    assert pager.ledger.holders() == ["b"]


def test_a_partly_filled_page_is_never_evicted() -> None:
    pager = make_pager()
    assert pager.hold("a", [1])
    write(pager, 1, tokens=PAGE - 1)
    pager.forget("a")
    use(pager, "b", 2, 3, 4)
    pager.forget("b")
    assert pager.unpromised_pages == 3
    assert not pager.hold("c", [5, 6, 7, 8])
    assert pager.hold("c", [5, 6, 7])
    assert_content(pager, 1, tokens=PAGE - 1)


def test_storing_what_is_not_on_the_device_is_an_error() -> None:
    pager = make_pager()
    with pytest.raises(LedgerError, match="mirrored without a device copy"):
        pager.store(np.array([1]))


def test_storing_nothing() -> None:
    pager = make_pager()
    pager.store(np.array([], dtype=np.int64))
    assert pager.stored_pages == 0


def test_stored_pages_are_counted() -> None:
    pager = make_pager()
    use(pager, "a", 1, 2)
    assert pager.stored_pages == 2
    assert pager.page_bytes == LAYERS * 2 * PAGE * HEADS * DIM * 4


def test_promised_pages_cannot_be_had() -> None:
    pager = make_pager()
    assert pager.unpromised_pages == 4
    pager.reservations.promise("a", 3)
    assert pager.unpromised_pages == 1
    pager.forget("a")
    assert pager.unpromised_pages == 4


def test_forget_keeps_what_others_hold() -> None:
    pager = make_pager()
    use(pager, "a", 1, 2)
    assert pager.hold("b", [2])
    pager.forget("a")
    pager.forget("a")
    assert pager.ledger.held_by("b") == {2}
    assert pager.unpromised_pages == 3


def test_reset() -> None:
    pager = make_pager()
    use(pager, "a", 1, 2)
    pager.reservations.promise("b", 1)
    pager.forget("a")
    pager.reset()
    assert pager.unpromised_pages == 4
    assert not pager.v2p.any()
    pager.ledger.allocate([1])


def test_a_reset_that_is_refused_changes_nothing() -> None:
    pager = make_pager()
    use(pager, "a", 1)
    pager.reservations.promise("b", 1)
    with pytest.raises(LedgerError, match="hold pages"):
        pager.reset()
    assert owed(pager) == {"b": 1}


def test_the_table_that_attention_reads_is_the_ledgers() -> None:
    pager = make_pager()
    assert pager.hold("a", [7])
    assert int(pager.v2p[7]) == int(pager.ledger.v2p[7]) > 0
    assert pager.v2p.dtype == torch.int64


# --- copies that take time, as on a GPU ------------------------------------------------------------------------------


class LateTransfer(HostTransfer):
    """Copies only begin when they are asked for. They end, oldest first, when the test lets the pager poll them."""

    def __init__(self, pager: Pager) -> None:
        super().__init__(pager.keys, pager.values, pager.mirror.pages)
        self.storing: list[tuple[np.ndarray, np.ndarray, Finished]] = []
        self.recalling: list[tuple[np.ndarray, np.ndarray, Finished]] = []
        self.done = 0
        self.waited = 0

    def store(self, physical: np.ndarray, virtual: np.ndarray, finished: Finished) -> None:
        self.storing.append((physical, virtual, finished))

    def recall(
        self, physical: np.ndarray, virtual: np.ndarray, finished: Finished, layer_by_layer: bool = False
    ) -> None:
        self.recalling.append((physical, virtual, finished))

    def poll(self) -> None:
        """So many more copies are done."""
        while self.done and (self.storing or self.recalling):
            self.done -= 1
            if self.storing:
                super().store(*self.storing.pop(0))
            else:
                super().recall(*self.recalling.pop(0))

    def wait(self) -> None:
        self.done = len(self.storing) + len(self.recalling)
        self.poll()

    def before_next_kernel(self) -> None:
        """The kernel itself waits, the pager learns it later; here the content comes at once."""
        self.waited += 1
        for physical, virtual, _ in self.recalling:
            super().recall(physical, virtual, lambda: None)


def late_pager() -> tuple[Pager, LateTransfer]:
    pager = make_pager()
    transfer = pager.transfer = LateTransfer(pager)
    return pager, transfer


def finish(pager: Pager, copies: int) -> None:
    assert isinstance(pager.transfer, LateTransfer)
    pager.transfer.done = copies
    pager.poll()


def test_a_page_is_mirrored_when_its_copy_is_done() -> None:
    pager, _ = late_pager()
    use(pager, "a", 1, 2)
    pager.forget("a")
    assert not pager.ledger.is_mirrored([1, 2]).any()
    assert pager.unpromised_pages == PHYSICAL - 2
    pager.poll()
    assert pager.unpromised_pages == PHYSICAL - 2
    finish(pager, 1)
    assert pager.ledger.is_mirrored([1, 2]).all()
    assert pager.unpromised_pages == PHYSICAL
    assert pager.stored_pages == 2


def test_what_is_stored_later_is_named_by_the_call() -> None:
    """The caller may use its array for something else."""
    pager, _ = late_pager()
    assert pager.hold("a", [1, 2])
    pages = np.array([1])
    pager.store(pages)
    pages[0] = 2
    finish(pager, 1)
    assert pager.ledger.is_mirrored([1, 2]).tolist() == [True, False]


@pytest.mark.parametrize("again", [False, True], ids=["released", "handed out again"])
def test_a_copy_of_a_page_that_is_gone_mirrors_nothing(again: bool) -> None:
    pager, _ = late_pager()
    use(pager, "a", 1, 2)
    pager.forget("a")
    pager.ledger.release([1])
    if again:
        pager.ledger.allocate([1])
        assert pager.hold("b", [1])
    pager.ledger.check()
    finish(pager, 1)
    assert pager.ledger.is_mirrored([1, 2]).tolist() == [False, True]
    pager.ledger.check()
    assert pager.ledger.obtainable_pages == PHYSICAL - again


def test_a_page_whose_place_moved_during_its_copy_is_not_mirrored() -> None:
    pager, _ = late_pager()
    use(pager, "x", 1)
    finish(pager, 1)
    pager.forget("x")
    use(pager, "a", 2, 3, 4, 5)  # evicts 1
    pager.ledger.substitute("a", [2], [1])
    pager.ledger.check()
    finish(pager, 1)
    assert pager.ledger.is_mirrored([1, 2, 3, 4, 5]).tolist() == [True, False, True, True, True]
    pager.ledger.check()


def recalled_late() -> tuple[Pager, LateTransfer]:
    """Page 1 was evicted and is held again; its content is on its way."""
    pager, transfer = late_pager()
    use(pager, "a", 1)
    pager.forget("a")
    finish(pager, 1)
    use(pager, "b", 2, 3, 4, 5)
    pager.forget("b")
    finish(pager, 1)
    assert pager.hold("c", [1, 5])
    return pager, transfer


def test_a_recalled_page_arrives_when_its_copy_is_done() -> None:
    pager, transfer = recalled_late()
    pages = np.array([1, 5])
    assert not pager.arrived(pages)
    assert pager.arrived(pages[1:])
    assert transfer.recalled_pages == 0
    finish(pager, 1)
    assert pager.arrived(pages)
    assert transfer.recalled_pages == 1
    assert pager.late_pages == 0
    assert_content(pager, 1)


def test_required_pages_are_there_before_the_next_kernel() -> None:
    pager, transfer = recalled_late()
    pager.require(np.array([5]))
    assert transfer.waited == 0
    pager.require(np.array([1, 5]))
    assert transfer.waited == 1
    assert_content(pager, 1)
    finish(pager, 1)
    pager.require(np.array([1, 5]))
    assert transfer.waited == 1


def test_pages_for_a_coming_window_are_counted_and_late_ones_too() -> None:
    pager, _ = recalled_late()
    assert pager.prefetched_pages == 0  # page 1 was wanted at once
    pager.forget("c")
    finish(pager, 1)
    assert pager.hold_if_spare("c", np.array([1, 5]), 0)
    assert pager.prefetched_pages == 0  # both are there
    pager.count_late(np.array([1, 5]))
    assert pager.late_pages == 0
    assert pager.hold_if_spare("c", np.array([2]), 0)
    assert pager.prefetched_pages == 1
    pager.count_late(np.array([1, 2]))
    assert pager.late_pages == 1


def test_a_page_that_is_on_its_way_is_recalled_once() -> None:
    pager, transfer = recalled_late()
    assert pager.hold("d", [1])
    assert len(transfer.recalling) == 1
    pager.forget("c")
    pager.forget("d")
    assert pager.ledger.obtainable_pages == PHYSICAL - 1
    assert pager.hold("e", [1])
    assert len(transfer.recalling) == 1
    finish(pager, 1)
    assert_content(pager, 1)


def test_the_place_of_a_page_released_on_its_way_is_not_reused_before_it_came() -> None:
    pager, _ = recalled_late()
    place = int(pager.v2p[1])
    pager.forget("c")
    pager.ledger.release([1])
    assert pager.hold("d", [6, 7, 8])
    assert place not in pager.v2p[torch.tensor([6, 7, 8])].tolist()
    assert not pager.hold("d", [9])
    finish(pager, 1)
    assert pager.hold("d", [9])
    assert int(pager.v2p[9]) == place
    pager.ledger.check()


def test_settle_waits_for_copies() -> None:
    pager, transfer = recalled_late()
    use(pager, "c", 6)
    pager.settle()
    assert (transfer.storing, transfer.recalling) == ([], [])
    assert pager.ledger.is_mirrored([6]).all()
    assert pager.arrived(np.array([1, 5, 6]))


def test_reset_waits_for_copies() -> None:
    pager, transfer = recalled_late()
    pager.forget("c")
    pager.reset()
    assert (transfer.storing, transfer.recalling) == ([], [])
    assert pager.unpromised_pages == PHYSICAL


def test_forward_passes_are_done_when_they_return() -> None:
    pager = make_pager()
    use(pager, "a", 1)
    number = pager.ledger.forward_started()
    pager.forget("a")
    assert pager.unpromised_pages == PHYSICAL - 1
    pager.forward_queued(number)
    assert pager.unpromised_pages == PHYSICAL


def test_flush_leaves_nothing_to_tell() -> None:
    pager = make_pager()
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
    pager = make_pager()
    written: set[int] = set()
    for holder, pages in operations:
        if not pages:
            pager.forget(holder)
        elif pager.hold(holder, pages):
            pager.ledger.drop(holder, pager.ledger.held_by(holder) - pages)
            for page in pages - written:
                write(pager, page)
            pager.store(np.array(sorted(pages - written), dtype=np.int64))
            written |= pages
        for page in {page for name in "abc" for page in pager.ledger.held_by(name)}:
            assert_content(pager, page)
        pager.ledger.check()


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sets(st.integers(1, VIRTUAL), max_size=3), st.integers(0, 2))))
def test_whatever_is_on_its_way_requests_read_what_was_written(operations: list[tuple[str, set[int], int]]) -> None:
    """The same with copies that end later; forgotten pages are released, and handed out again with other content."""
    pager, _ = late_pager()
    written: set[int] = set()
    for holder, pages, done in operations:
        if not pages:
            pager.forget(holder)
        elif pager.hold(holder, pages):
            pager.ledger.drop(holder, pager.ledger.held_by(holder) - pages)
            for page in pages - written:
                write(pager, page)
            pager.store(np.array(sorted(pages - written), dtype=np.int64))
            written |= pages
        else:
            gone = sorted(page for page in written - pages if not pager.ledger.is_held([page])[0])
            pager.ledger.release(gone)
            pager.ledger.allocate(gone)
            written.difference_update(gone)
        finish(pager, done)
        for page in {page for name in "abc" for page in pager.ledger.held_by(name)}:
            if pager.arrived(np.array([page])):
                assert_content(pager, page)
        pager.ledger.check()
    pager.settle()
    for page in {page for name in "abc" for page in pager.ledger.held_by(name)}:
        assert_content(pager, page)
