"""VirtualPageAllocator: SGLang's slots, page for page, with the ledger always in step. Runs on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import owed
from release import RELEASE
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.ledger import LedgerError
from sglang_lsa.memory.pager import Pager
from sglang_lsa.radix_ext.allocator import VirtualPageAllocator

pytestmark = pytest.mark.release

PAGE = 4
PAGES = 12


def make_allocator(page: int = PAGE, pages: int = PAGES) -> VirtualPageAllocator:
    keys, values = ([torch.zeros(5 * page, 1, 2)] for _ in range(2))
    pager = Pager(MhaLayout(keys, values, page), pages)
    return VirtualPageAllocator(pages * page, page, torch.float32, "cpu", SimpleNamespace(), pager)


def assert_in_step(allocator: VirtualPageAllocator) -> None:
    """What the allocator has not handed out is what the ledger takes for not allocated."""
    ledger = allocator.pager.ledger
    ledger.check()
    free = allocator.free_pages.tolist()
    assert len(set(free)) == len(free)
    unallocated = [page for page in range(1, ledger.virtual_pages + 1) if not ledger._allocated[page]]
    assert sorted(free) == unallocated
    assert allocator.available_size() == len(free) * allocator.page_size
    assert allocator._free_on_host.tolist() == free, "the host knows another order than the device"


class Requests:
    """Rows of slots, as SGLang keeps them, growing and ending through the allocator."""

    def __init__(self, allocator: VirtualPageAllocator) -> None:
        self.allocator = allocator
        self.rows: list[list[int]] = []

    def extend(self, lengths: list[tuple[int, int]]) -> bool:
        """Prefill ``(row, more tokens)``; a row beyond the last is a new request. One batch."""
        while len(self.rows) <= max(row for row, _ in lengths):
            self.rows.append([])
        prefix = torch.tensor([len(self.rows[row]) for row, _ in lengths])
        seq = prefix + torch.tensor([more for _, more in lengths])
        last = torch.tensor([self.rows[row][-1] if self.rows[row] else -1 for row, _ in lengths])
        total = int((seq - prefix).sum())
        before = self.allocator.free_pages.clone()
        slots = self.allocator.alloc_extend(prefix, prefix, seq, seq, last, total)
        expected = torch.empty(total, dtype=torch.int64)
        if slots is None:
            assert torch.equal(self.allocator.free_pages, before)
            assert self.allocator.take_new_pages().tolist() == []
            return False
        alloc_extend_naive(prefix, seq, last, before, expected, self.allocator.page_size, "cpu")
        assert torch.equal(slots, expected)
        opened = []
        for (row, more), new in zip(lengths, slots.split([more for _, more in lengths]), strict=True):
            assert len(new) == more
            opened += self.opened(new)
            self.rows[row] += new.tolist()
        assert self.allocator.take_new_pages().tolist() == opened
        return True

    def opened(self, slots: torch.Tensor) -> list[int]:
        """Pages whose first slot is among these, in their order."""
        page = self.allocator.page_size
        return [slot // page for slot in slots.tolist() if slot % page == 0]

    def decode(self, rows: list[int]) -> bool:
        seq = torch.tensor([len(self.rows[row]) + 1 for row in rows])
        last = torch.tensor([self.rows[row][-1] for row in rows])
        before = self.allocator.free_pages.clone()
        slots = self.allocator.alloc_decode(seq, seq, last)
        if slots is None:
            assert torch.equal(self.allocator.free_pages, before)
            assert self.allocator.take_new_pages().tolist() == []
            return False
        # One token more is an extension by one.
        expected = torch.empty(len(rows), dtype=torch.int64)
        alloc_extend_naive(seq - 1, seq, last, before, expected, self.allocator.page_size, "cpu")
        assert torch.equal(slots, expected)
        for row, slot in zip(rows, slots.tolist(), strict=True):
            self.rows[row].append(slot)
        assert self.allocator.take_new_pages().tolist() == self.opened(slots)
        return True

    def end(self, row: int, how: str) -> None:
        slots, self.rows[row] = torch.tensor(self.rows[row], dtype=torch.int64), []
        if how == "free":
            self.allocator.free(slots)
        elif how == "segment":
            self.allocator.free_segment(slots, start_pos=0)
        else:  # as the radix tree does: a duplicate prefix of whole pages, and the rest, in one group
            middle = len(slots) // 2 // self.allocator.page_size * self.allocator.page_size
            self.allocator.free_group_begin()
            self.allocator.free(slots[:middle])
            self.allocator.free_segment(slots[middle:], start_pos=middle)
            self.allocator.free_group_end()

    def assert_consistent(self) -> None:
        """Slots of a request are consecutive within pages; no page belongs to two requests, or is free."""
        page = self.allocator.page_size
        owners: dict[int, int] = {}
        for row, slots in enumerate(self.rows):
            for position, slot in enumerate(slots):
                assert slot % page == position % page
                assert owners.setdefault(slot // page, row) == row
        assert 0 not in owners
        assert not set(owners) & set(self.allocator.free_pages.tolist())
        assert len(owners) + len(self.allocator.free_pages) == self.allocator.pager.ledger.virtual_pages
        assert sorted(owners) == torch.from_numpy(self.allocator.pager.ledger._allocated).nonzero().flatten().tolist()


# --- examples --------------------------------------------------------------------------------------------------------


def test_a_new_allocator_has_everything() -> None:
    allocator = make_allocator()
    assert allocator.available_size() == PAGES * PAGE
    assert_in_step(allocator)


def test_extend() -> None:
    allocator = make_allocator()
    requests = Requests(allocator)
    assert requests.extend([(0, 6), (1, 4), (2, 1)])
    assert requests.rows == [[4, 5, 6, 7, 8, 9], [12, 13, 14, 15], [16]]
    assert requests.extend([(0, 5), (2, 3)])
    assert requests.rows[0] == [4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22]
    assert requests.rows[2] == [16, 17, 18, 19]
    assert allocator.pager.ledger.allocated_pages == 5
    assert_in_step(allocator)


def test_decode() -> None:
    allocator = make_allocator()
    requests = Requests(allocator)
    requests.extend([(0, 3), (1, 4)])
    assert requests.decode([0, 1])
    assert requests.rows == [[4, 5, 6, 7], [8, 9, 10, 11, 12]]
    assert requests.decode([0, 1])
    assert requests.rows == [[4, 5, 6, 7, 16], [8, 9, 10, 11, 12, 13]]
    assert_in_step(allocator)


def test_new_pages_are_told_once_and_in_order() -> None:
    """Several allocations may lie between two batches."""
    allocator = make_allocator()
    assert allocator.take_new_pages().tolist() == []
    slots = allocator.alloc(2 * PAGE)
    allocator.alloc(PAGE)
    allocator.free(slots[PAGE:])
    allocator.alloc(2 * PAGE)
    pages = allocator.take_new_pages()
    assert pages.tolist() == [1, 2, 3, 2, 4]
    assert pages.dtype == "int64"
    assert allocator.take_new_pages().tolist() == []


def test_a_decode_step_that_opens_no_page_needs_none() -> None:
    allocator = make_allocator(pages=4)
    requests = Requests(allocator)
    requests.extend([(0, 14)])
    assert allocator.available_size() == 0
    assert requests.decode([0])
    assert_in_step(allocator)


@pytest.mark.parametrize("page", [PAGE, 64])
def test_alloc(page: int) -> None:
    allocator = make_allocator(page)
    slots = allocator.alloc(2 * page)
    assert slots.tolist() == list(range(page, 3 * page))
    assert allocator.pager.ledger.allocated_pages == 2
    assert allocator.alloc(page * PAGES) is None
    assert_in_step(allocator)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    allocator = make_allocator(pages=4)
    requests = Requests(allocator)
    assert not requests.extend([(0, 17)])
    assert requests.extend([(0, 16)])
    assert not requests.decode([0])
    assert allocator.pager.ledger.allocated_pages == 4
    assert_in_step(allocator)


@pytest.mark.parametrize("how", ["free", "segment", "group"])
def test_freed_pages_come_back(how: str) -> None:
    allocator = make_allocator()
    requests = Requests(allocator)
    requests.extend([(0, 17), (1, 3)])
    requests.end(0, how)
    assert allocator.available_size() == (PAGES - 1) * PAGE
    assert allocator.pager.ledger.allocated_pages == 1
    assert_in_step(allocator)


def test_pages_freed_in_a_group_come_back_when_it_ends() -> None:
    allocator = make_allocator()
    slots = allocator.alloc(3 * PAGE)
    allocator.free_group_begin()
    allocator.free(slots[:PAGE])
    allocator.free_segment(slots[PAGE:], start_pos=PAGE)
    assert allocator.pager.ledger.allocated_pages == 3
    assert_in_step(allocator)
    allocator.free_group_end()
    assert allocator.pager.ledger.allocated_pages == 0
    assert_in_step(allocator)


def test_a_segment_that_starts_inside_a_page() -> None:
    allocator = make_allocator()
    slots = allocator.alloc(3 * PAGE)
    allocator.free_segment(slots[2:], start_pos=2)
    assert allocator.available_size() == PAGES * PAGE
    assert_in_step(allocator)


@pytest.mark.skipif(RELEASE.checkpoints, reason="this SGLang frees segments from the start of a page alone")
def test_segments_that_share_a_page_free_it_once() -> None:
    allocator = make_allocator()
    slots = allocator.alloc(3 * PAGE)
    allocator.free_segments([(slots[: PAGE + 2], 0), (slots[PAGE + 2 :], PAGE + 2)])
    assert allocator.available_size() == PAGES * PAGE
    assert_in_step(allocator)


@pytest.mark.skipif(not RELEASE.checkpoints, reason="this SGLang frees what shares a page, too")
def test_segments_start_with_a_page() -> None:
    allocator = make_allocator()
    slots = allocator.alloc(3 * PAGE)
    with pytest.raises(AssertionError, match="shares a page"):
        allocator.free_segments([(slots[: PAGE + 2], 0), (slots[PAGE + 2 :], PAGE + 2)])
    allocator = make_allocator()
    slots = allocator.alloc(3 * PAGE)
    allocator.free_segments([(slots[: 2 * PAGE], 0), (slots[2 * PAGE :], 2 * PAGE)])
    assert allocator.available_size() == PAGES * PAGE
    assert_in_step(allocator)


def test_freeing_nothing() -> None:
    allocator = make_allocator()
    allocator.free(torch.zeros(0, dtype=torch.int64))
    allocator.free_segment(torch.zeros(0, dtype=torch.int64), start_pos=0)
    assert_in_step(allocator)


@pytest.mark.parametrize("slots", [[PAGE, PAGE + 1], [0, 1]], ids=["not allocated", "padding"])
def test_freeing_what_was_not_handed_out_is_an_error(slots: list[int]) -> None:
    allocator = make_allocator()
    with pytest.raises(LedgerError, match="released but not allocated"):
        allocator.free(torch.tensor(slots))
    assert_in_step(allocator)


def test_freeing_what_is_held_is_an_error() -> None:
    allocator = make_allocator()
    slots = allocator.alloc(PAGE)
    assert allocator.pager.hold("a", [1])
    with pytest.raises(LedgerError, match="released while held"):
        allocator.free(slots)
    assert_in_step(allocator)


def test_a_page_freed_twice_in_a_group_is_an_error() -> None:
    allocator = make_allocator()
    slots = allocator.alloc(PAGE)
    allocator.free_group_begin()
    allocator.free_segment(slots, start_pos=0)
    allocator.free_segment(slots, start_pos=0)
    with pytest.raises(LedgerError):
        allocator.free_group_end()
    allocator.pager.ledger.check()


def test_clear_resets_everything() -> None:
    allocator = make_allocator()
    slots = allocator.alloc(3 * PAGE)
    assert allocator.pager.hold("a", [1, 2])
    allocator.pager.forget("a")
    allocator.pager.reservations.promise("b", 1)
    allocator.free_group_begin()
    allocator.free(slots)
    allocator.clear()
    allocator.free_group_end()  # of a group whose pages are free already
    assert allocator.available_size() == PAGES * PAGE
    assert allocator.pager.ledger.allocated_pages == allocator.pager.ledger.device_pages == 0
    assert owed(allocator.pager) == {}
    assert allocator.take_new_pages().tolist() == []
    assert_in_step(allocator)
    assert allocator.alloc(PAGE).tolist() == list(range(PAGE, 2 * PAGE))


def test_clear_while_pages_are_held_is_an_error() -> None:
    allocator = make_allocator()
    allocator.alloc(PAGE)
    assert allocator.pager.hold("a", [1])
    with pytest.raises(LedgerError, match=r"reset while \['a'\] hold pages"):
        allocator.clear()


# --- random sequences ------------------------------------------------------------------------------------------------


ROWS = 5
OPERATION = st.one_of(
    st.tuples(
        st.just("extend"),
        st.lists(
            st.tuples(st.integers(0, ROWS - 1), st.integers(1, 3 * PAGE)),
            min_size=1,
            max_size=3,
            unique_by=lambda pair: pair[0],
        ),
    ),
    st.tuples(st.just("decode"), st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True)),
    st.tuples(st.sampled_from(["free", "segment", "group"]), st.integers(0, ROWS - 1)),
    st.tuples(st.just("clear"), st.just(0)),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(st.lists(OPERATION, max_size=40))
def test_any_sequence_gives_what_sglang_gives_and_keeps_the_ledger_in_step(operations: list[tuple[str, Any]]) -> None:
    allocator = make_allocator()
    requests = Requests(allocator)
    requests.rows = [[] for _ in range(ROWS)]
    for name, what in operations:
        if name == "extend":
            requests.extend(what)
        elif name == "decode":
            running = [row for row in what if requests.rows[row]]
            if running:
                requests.decode(running)
        elif name == "clear":
            requests.rows = [[] for _ in range(ROWS)]
            allocator.clear()
        else:
            requests.end(what, name)
        requests.assert_consistent()
        assert_in_step(allocator)
