"""Pager: copies that take time, as on a GPU; who reads waits for them, and what is gone meanwhile stays gone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pager_pages import PHYSICAL, Pages, late_pages


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
