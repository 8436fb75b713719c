"""SGLang's radix tree for models with a sliding window over virtual pages: who keeps which pages, and nothing
read wrong, lost or left. Runs SGLang's own tree on the CPU."""

from __future__ import annotations

from array import array
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.common import free_swa_out_of_window_slots
from simulated_swa import SwaSimulation, freeing_early
from swa_server import Server, text

from sglang_lsa.engine.shared_pages import SharedPages
from sglang_lsa.radix_ext.allocator import VirtualPageAllocator
from sglang_lsa.radix_ext.unified_cache import LSASwaChunkCache, LSAUnifiedRadixCache
from sglang_lsa.serve.view.tree import TreePicture


def failures(seeds: range, page: int) -> list[str]:
    """What goes wrong with the first of these seeds with which something does."""
    for seed in seeds:
        simulation = SwaSimulation(seed, page=page)
        try:
            simulation.run()
        except Exception as error:
            return [f"{simulation}: {error}"]
        assert simulation.pager.page_index.reads == 0, "the device was asked which pages it has"
    return []


@pytest.mark.parametrize(
    ("page", "seeds"),
    [
        (16, range(4)),
        (64, range(16, 18)),
        (256, range(22, 24)),
        *(
            pytest.param(page, seeds, marks=pytest.mark.slow)
            for page, seeds in ((16, range(4, 10)), (64, range(18, 20)), (256, range(24, 26)))
        ),
    ],
)
def test_nothing_is_read_wrong_lost_or_left(page: int, seeds: range) -> None:
    assert failures(seeds, page) == []


def test_it_finds_pages_that_go_before_their_holder_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtualPageAllocator, "holding_back", lambda self: nullcontext())
    assert failures(range(5), 16)


def test_it_finds_holds_that_are_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedPages, "replaced", lambda self, *arguments: None)
    assert failures(range(5), 16)


def test_it_finds_a_tree_that_always_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models without a window: what the tree has before is taken for what it will have."""

    def cache_unfinished_req(self: Any, req: Any, chunked: bool = False) -> None:
        key, row = req.lsa_key, self.req_to_token_pool.req_to_token[req.req_pool_idx]
        own, tokens, pages = self.lsa.shared.known(key, req.req_pool_idx), len(req.get_fill_ids()), []
        node, ids = self.tree_core.root_node, list(req.get_fill_ids())
        while child := next((n for n in node.children.values() if list(n.key.token_ids) == ids[: len(n.key)]), None):
            pages += self.page_index.pages(child.value).tolist()
            node, ids = child, ids[len(child.key) :]
        self.lsa.shared.replaced(key, req.req_pool_idx, tokens, own, np.array(pages, dtype=np.int64))
        self._inserting = own
        with self.page_index.row(row, own):
            super(LSAUnifiedRadixCache, self).cache_unfinished_req(req, chunked=chunked)

    monkeypatch.setattr(LSAUnifiedRadixCache, "cache_unfinished_req", cache_unfinished_req)
    assert failures(range(5), 16)


SIZES = pytest.mark.parametrize(("page", "window"), [(16, 8), (16, 32), (256, 128)])
"""The last are DeepSeek-V4's."""


@SIZES
def test_a_tombstone_that_nobody_reads_takes_the_pages_of_who_computes_it_again(page: int, window: int) -> None:
    server = Server(page, window)
    document, tail = text(0, 8 * page), -(-window // page)
    first = server.come("first", [*document, 1])
    had = server.pages(first)[:8]
    server.end(first)
    server.forget_windows(but=tail)
    assert len(server.match([*document, 2]).device_indices) == 8 * page, "the end of a prompt is found"
    server.ledger.heat.select(np.array(had[:2]))
    second = server.come("second", [*document[: 6 * page], *text(10**6, page + 3)])
    own = server.pages(second)
    assert not set(own) & set(had), "it computed everything and kept its pages"
    assert server.pager.page_index.matched(server.match(document[: 6 * page]).device_indices, ()).tolist() == own[:6]
    free = server.allocator.full_attn_allocator.free_pages.tolist()
    assert set(had[:6]) <= set(free) and not set(had[6:]) & set(free)
    assert server.ledger.heat.hottest(np.array(own), 9).tolist() == own[:2], "and what the pages were worth"
    third = server.come("third", [*document[: 6 * page], *text(2 * 10**6, 5)])
    assert server.pages(third)[:6] == own[:6] and third.cache_protected_len == 6 * page
    server.end(second)
    server.end(third)
    server.assert_idle()


@SIZES
def test_a_tombstone_that_somebody_reads_keeps_its_pages(page: int, window: int) -> None:
    server = Server(page, window)
    document = text(0, 8 * page)
    first = server.come("first", [*document, 1])
    had = server.pages(first)
    server.forget_windows(but=0)
    second = server.come("second", [*document[: 6 * page], *text(10**6, page + 3)])
    assert server.pages(second)[:6] == had[:6] and server.pages(first) == had
    assert (server.places[server.table[second.req_pool_idx, : 6 * page].long()] > 0).all(), "with the new windows"
    assert server.ledger.held_pages == len(had) + 2
    third = server.come("third", [*document[: 6 * page], *text(2 * 10**6, 5)])
    assert server.pages(third)[:6] == had[:6] and third.cache_protected_len == 6 * page
    server.end(first)
    server.end(third, insert=False)
    server.end(second)
    server.assert_idle()


@SIZES
@pytest.mark.parametrize("read", [False, True])
def test_a_tombstone_of_which_a_part_has_a_window_again(page: int, window: int, read: bool) -> None:
    server = Server(page, window)
    document, tail = text(0, 8 * page), -(-window // page)
    first = server.come("first", [*document, 1])
    had = server.pages(first)
    if not read:
        server.end(first)
    server.forget_windows(but=0 if read else tail)
    with freeing_early(True):
        second = server.come("second", [*document[: 6 * page], 10**6])
    own = server.pages(second)[:6]
    assert own[: 6 - tail] == had[: 6 - tail]
    assert (own[6 - tail :] == had[6 - tail : 6]) == read
    assert len(server.match(document[: 6 * page]).device_indices) == 6 * page
    if read:
        server.end(first)
    server.end(second)
    server.assert_idle()


def test_a_request_that_is_retracted_leaves_the_tree_as_it_was() -> None:
    server = Server()
    first = server.come("first", text(0, 100))
    for token in range(40):
        server.extend(first, 100 + token, 101 + token)
        free_swa_out_of_window_slots(
            first,
            100 + token,
            sliding_window_size=8,
            page_size=16,
            req_to_token_pool=server.tree.req_to_token_pool,
            token_to_kv_pool_allocator=server.allocator,
        )
    server.end(first, insert=False)
    server.assert_idle()
    assert len(server.match(text(0, 140)).device_indices) == 96


def test_a_row_changes_after_the_pass_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode graph that makes its page table itself reads rows when SGLang takes them for read."""
    order: list[str] = []
    server = Server()
    shared, write = server.runtime.shared, server.tree.req_to_token_pool.write

    def noted(*arguments: Any) -> None:
        order.append("write")
        write(*arguments)

    server.tree.req_to_token_pool.write = noted
    monkeypatch.setattr(shared, "after_passes", lambda: order.append("wait"))
    server.end(server.come("first", text(0, 100)))
    assert order == ["wait", "write"]
    monkeypatch.undo()
    stream = SimpleNamespace(wait_stream=order.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    shared.after_passes()
    assert len(order) == 2, "on a CPU a pass is done when it is queued"
    monkeypatch.setattr(shared, "pager", SimpleNamespace(device=torch.device("cuda"), compute=lambda: "forward"))
    shared.after_passes()
    assert order[2:] == ["forward"]


def test_only_prompts_stay() -> None:
    server = Server()
    first = server.come("first", text(0, 100))
    first.output_ids = array("q", text(100, 61))
    for token in range(60):
        server.extend(first, 100 + token, 101 + token)
    server.end(first)
    server.assert_idle()
    assert server.tree.full_evictable_size() == 96


def test_frees_of_a_group_come_at_its_end() -> None:
    server = Server(disable=True)
    assert isinstance(server.tree, LSASwaChunkCache)
    allocator, row = server.allocator, server.table[1]
    slots = allocator.alloc_extend(*[torch.tensor([n]) for n in (0, 0, 40, 40, -1)], 40)
    row[:40] = slots.int()
    allocator.free_group_begin()
    allocator.free_segment(row[16:40], start_pos=16)
    assert allocator.full_available_size() == 197 * 16 and allocator.swa_available_size() == 61 * 16
    row[16:40] = 0
    allocator.free_group_end()
    assert allocator.full_available_size() == 199 * 16 and allocator.swa_available_size() == 63 * 16
    allocator.free(slots[:16])
    assert not server.places[:-1].any() and allocator.available_size() == 64 * 16


def test_a_step_that_finds_no_room_takes_nothing() -> None:
    server = Server(swa_pages=2)
    allocator = server.allocator
    slots = allocator.alloc_extend(*[torch.tensor([n]) for n in (0, 0, 32, 32, -1)], 32)
    two = torch.tensor([33])
    assert allocator.alloc_decode(two, two, slots[-1:]) is None
    assert allocator.full_available_size() == 198 * 16
    server.ledger.check()


def test_pages_of_another_size_are_refused() -> None:
    server = Server()
    with pytest.raises(ValueError, match="pages of 32 tokens, KV in pages of 16"):
        type(server.allocator)(320, 320, 32, torch.float32, "cpu", server.allocator.get_kvcache(), server.pager)


def test_without_a_tree_everything_goes() -> None:
    server = Server(disable=True)
    row = server.table[1]
    row[:40] = server.allocator.alloc_extend(*[torch.tensor([n]) for n in (0, 0, 40, 40, -1)], 40).int()
    req = SimpleNamespace(rid="r", lsa_key="", req_pool_idx=1, cache_protected_len=0, finished=lambda: False)
    server.tree.cache_finished_req(req, kv_len_to_handle=40)
    assert server.allocator.available_size() == 64 * 16 and server.allocator.full_available_size() == 200 * 16


def test_the_live_view_draws_it() -> None:
    server = Server()
    first = server.come("first", text(0, 100))
    server.come("second", [*text(0, 50), *text(1000, 20)])
    server.ledger.heat.select(np.array(server.pages(first)[:1]))
    drawn = TreePicture().take(server.tree, server.ledger, server.page)["nodes"]
    pages = [row[1] for row in drawn]
    assert sum(pages) == 7 and drawn[0][0] == -1 and drawn[0][2] == 2 and drawn[0][3] > 0.9
