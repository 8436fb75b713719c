"""Pager: the ledger's decisions on real memory; every byte comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_lsa.radix_ext.ledger import LedgerError
from sglang_lsa.radix_ext.pager import Pager

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
    pager.reserved["a"] = 3
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
    pager.reserved["b"] = 1
    pager.forget("a")
    pager.reset()
    assert pager.unpromised_pages == 4
    assert not pager.v2p.any()
    pager.ledger.allocate([1])


def test_a_reset_that_is_refused_changes_nothing() -> None:
    pager = make_pager()
    use(pager, "a", 1)
    pager.reserved["b"] = 1
    with pytest.raises(LedgerError, match="hold pages"):
        pager.reset()
    assert pager.reserved == {"b": 1}


def test_the_table_that_attention_reads_is_the_ledgers() -> None:
    pager = make_pager()
    assert pager.hold("a", [7])
    assert int(pager.v2p[7]) == int(pager.ledger.v2p[7]) > 0
    assert pager.v2p.dtype == torch.int64


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
