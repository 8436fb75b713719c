"""Pages of a prefix, and of what is freed, are known on the host: SGLang's own tree and pools, with tensors that refuse
to be waited for."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from release import RELEASE, TreeDriver
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.page_index import PageIndex
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.patches.request_kv import slots_up_from
from sglang_lsa.patches.requests import choose, promise
from sglang_lsa.radix_ext.allocator import VirtualPageAllocator
from sglang_lsa.radix_ext.radix_cache import build_tree_cache

pytestmark = pytest.mark.release

WAITS = {
    "cpu",
    "numpy",
    "tolist",
    "item",
    "nonzero",
    "unique",
    "_unique2",
    "__array__",
    "__bool__",
    "__int__",
    "__index__",
}
ROWS, CONTEXT, VIRTUAL = 6, 12 * PAGE_SIZE, 60


class OnDevice(torch.Tensor):
    """A tensor of host memory that cannot be read as if there were none to wait for."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in WAITS:
            raise AssertionError(f"{function.__name__}() waits for the device")
        return super().__torch_function__(function, types, args, kwargs or {})


def seen(tensor: torch.Tensor) -> list[int]:
    """What is in a tensor that refuses to tell."""
    return tensor.as_subclass(torch.Tensor).tolist()


def test_the_guard() -> None:
    slots = torch.arange(128).as_subclass(OnDevice)
    for wait in (slots.cpu, slots[::64].tolist, (slots // 64).unique, slots[0].item, lambda: bool(slots[0])):
        with pytest.raises(AssertionError, match="waits for the device"):
            wait()
    with pytest.raises(AssertionError, match="waits for the device"):
        PageIndex(64).pages(slots)


class Server:
    """One scheduler's memory: SGLang's pools and tree over our allocator, with requests that compute nothing."""

    def __init__(self, guarded: bool, disable: bool = False):
        self.kind: Any = OnDevice if guarded else torch.Tensor
        keys, values = ([torch.zeros(41 * PAGE_SIZE, 1, 2)] for _ in range(2))
        self.pager = Pager(MhaLayout(keys, values, PAGE_SIZE), VIRTUAL)
        size = VIRTUAL * PAGE_SIZE
        pool: Any = SimpleNamespace()
        self.allocator = VirtualPageAllocator(size, PAGE_SIZE, torch.float32, "cpu", pool, self.pager)
        self.allocator.free_pages = self.allocator.free_pages.as_subclass(self.kind)
        self.table = torch.zeros((ROWS, CONTEXT), dtype=torch.int32).as_subclass(self.kind)
        self.runtime = LSARuntime(LSAConfig(debug=not guarded), self.pager, self.table, 2, 1.0)
        pool = SimpleNamespace(req_to_token=self.table, write=self.table.__setitem__)
        pool.free = lambda req: setattr(req.kv, "req_pool_idx", None)
        params = CacheInitParams(
            disable=disable, req_to_token_pool=pool, token_to_kv_pool_allocator=self.allocator, page_size=PAGE_SIZE
        )
        self.tree = build_tree_cache(params, self.runtime)
        self.driver = TreeDriver(self.tree)
        self.index = self.pager.page_index
        self.rows = list(range(1, ROWS))
        self.running: list[Any] = []

    def come(
        self, rid: str, tokens: list[int], chunk: int | None = None, blind: bool = False, salt: str | None = None
    ) -> Any:
        """A prompt is matched, admitted and prefilled, in chunks if asked for. ``blind``: it finds nothing."""
        req = self.driver.request(rid, array("q", tokens), self.rows.pop(), salt)
        req.prefix_indices = self.driver.match(req, req.origin_input_ids[: 0 if blind else -1])
        prefix = self.index.matched(req.prefix_indices, slots_up_from(req.last_node))
        assert prefix.tolist() == [slot // PAGE_SIZE for slot in seen(req.prefix_indices[::PAGE_SIZE])]
        self.write(req, 0, req.prefix_indices)
        self.runtime.requests[rid] = Request(rid, req.req_pool_idx, Asked("quest", 0.5), pages=prefix)
        self.running.append(req)
        ends = [*range(len(req.prefix_indices) + chunk, len(tokens), chunk), len(tokens)] if chunk else [len(tokens)]
        begin = len(req.prefix_indices)
        for end in ends:
            self.extend(req, begin, end)
            self.driver.computed(req, end, chunked=end < len(tokens))
            begin = end
        return req

    def extend(self, req: Any, begin: int, end: int) -> None:
        before, after = torch.tensor([begin]), torch.tensor([end])
        last = torch.tensor([seen(self.table[req.req_pool_idx])[begin - 1] if begin else -1])
        slots = self.allocator.alloc_extend(before, before, after, after, last, end - begin)
        assert slots is not None
        self.write(req, begin, slots)
        request = self.runtime.requests[req.rid]
        request.pages = np.concatenate((request.pages, self.allocator.take_new_pages()))
        request.tokens = end

    def write(self, req: Any, begin: int, slots: torch.Tensor) -> None:
        self.table[req.req_pool_idx, begin : begin + len(slots)] = slots.to(torch.int32)

    def answer(self, req: Any, tokens: list[int]) -> None:
        begin = len(req.origin_input_ids) + len(req.output_ids)
        self.extend(req, begin, begin + len(tokens))
        req.output_ids.extend(tokens)

    def end(self, req: Any, is_insert: bool = True) -> None:
        self.allocator.free_group_begin()
        length = len(req.origin_input_ids) + len(req.output_ids)
        row = req.req_pool_idx
        self.driver.release(req, length, is_insert)
        self.allocator.free_group_end()
        self.running.remove(req)
        self.rows.append(row)

    def nodes(self) -> list[Any]:
        found, todo = [], [] if self.tree.disable else list(self.tree.root_node.children.values())
        while todo:
            found.append(node := todo.pop())
            todo += node.children.values()
        return found

    def check(self) -> None:
        """Both free lists are the same, what is not in them belongs to somebody, and every node's pages are known."""
        free = seen(self.allocator.free_pages)
        assert self.allocator._free_on_host.tolist() == free
        owned = set()
        for node in self.nodes():
            pages = [slot // PAGE_SIZE for slot in seen(node.value[::PAGE_SIZE])]
            known = self.index.noted(node.value)
            assert known is not None and known.tolist() == pages
            assert not owned.intersection(pages)
            owned.update(pages)
        for req in self.running:
            request = self.runtime.requests[req.rid]
            row = seen(self.table[req.req_pool_idx, : request.tokens])[::PAGE_SIZE]
            assert request.pages.tolist() == [slot // PAGE_SIZE for slot in row]
            owned.update(request.pages.tolist())
        assert sorted(free) == sorted(set(range(1, VIRTUAL + 1)) - owned)
        self.pager.ledger.check()
        assert self.index.reads == 0, "the device was waited for"


def text(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=tokens)


@pytest.fixture(params=[True, False], ids=["guarded", "compared"])
def server(request: pytest.FixtureRequest) -> Server:
    """``compared``: with what is on the device, as ``--lsa-debug`` does."""
    return Server(request.param)


def test_a_prefix_is_known(server: Server) -> None:
    server.end(server.come("a", text(1, 200)))
    again = server.come("b", text(1, 200) + text(2, 100))
    assert again.cache_protected_len == 256, "what it computed is in the tree too"
    path = server.index.path(slots_up_from(again.last_node))
    assert path is not None and server.runtime.requests["b"].pages.tolist()[:3] == path[:3].tolist()
    server.check()


@pytest.mark.parametrize("running", [0, 1000], ids=["admitted", "waits"])
def test_admission_waits_for_nothing(running: int) -> None:
    """Also not in every scheduling pass in which the head of the queue has no room, when hot pages are sent for."""
    server = Server(guarded=True)
    server.end(server.come("a", text(1, 300)))
    tokens = array("q", text(1, 300) + text(2, 100))
    parameters = SimpleNamespace(custom_params=None, max_new_tokens=10)
    req = server.driver.request("b", tokens, 1)
    req.full_untruncated_fill_ids, req.sampling_params = tokens, parameters
    req.prefix_indices = server.driver.match(req, tokens)
    admitted = choose(server.runtime.admission, req, running, [], 512)
    assert (admitted is None) == (server.runtime.admission.waits == 1) == (running > 0)
    if admitted is not None:
        assert admitted.prefix.tolist() == [slot // PAGE_SIZE for slot in seen(req.prefix_indices[::PAGE_SIZE])]
        promise(server.runtime.admission, req, admitted)
    assert server.index.reads == 0


def test_a_split_is_known(server: Server) -> None:
    server.end(server.come("a", text(1, 320)))
    server.come("b", text(1, 150) + text(2, 200))
    assert sorted(len(node.value) for node in server.nodes()) == [128, 192, 192]
    server.check()


def test_the_same_prompt_twice_at_once(server: Server) -> None:
    """The second one was matched before the first was in the tree: its pages are freed, the tree's take their place."""
    one = server.come("a", text(1, 300))
    two = server.come("b", text(1, 300), blind=True)
    assert one.cache_protected_len == two.cache_protected_len == 256
    shared = [server.runtime.requests[rid].pages[:4].tolist() for rid in ("a", "b")]
    assert shared[0] == shared[1]
    server.check()
    server.answer(two, text(3, 100))
    server.end(one)
    server.end(two)
    server.check()


def test_chunks_and_answers(server: Server) -> None:
    req = server.come("a", text(1, 500), chunk=100)
    server.check()
    server.answer(req, text(2, 150))
    server.check()
    server.end(req)
    server.check()
    assert sum(len(node.value) for node in server.nodes()) == 500 // PAGE_SIZE * PAGE_SIZE, "prompts only"


def test_eviction(server: Server) -> None:
    for seed in range(4):
        server.end(server.come(f"r{seed}", text(0, 100) + text(seed + 1, 200)))
    server.tree.evict(EvictParams(num_tokens=400))
    server.check()
    assert server.runtime.host_evicted_pages > 0


def test_what_is_not_inserted_goes(server: Server) -> None:
    """As when a request is aborted or retracted."""
    req = server.come("a", text(1, 200))
    server.answer(req, text(2, 100))
    server.end(req, is_insert=False)
    server.check()
    assert len(server.nodes()) == 1, "its prompt was in the tree already"


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence(server: Server, seed: int) -> None:
    draw = random.Random(seed)
    for number in range(60):
        room = len(server.allocator.free_pages) - 12
        if draw.random() < 0.5 and server.rows and room > 0:
            stem = text(draw.randrange(3), draw.randrange(1, 300))
            tokens = stem + text(draw.randrange(4), draw.randrange(1, 200))
            server.come(f"r{number}", tokens, draw.choice([None, 64, 100, 130]), draw.random() < 0.2)
        elif server.running and draw.random() < 0.6:
            req = draw.choice(server.running)
            if len(req.origin_input_ids) + len(req.output_ids) < CONTEXT - 100 and room > 0:
                server.answer(req, text(number, draw.randrange(1, 90)))
        elif server.running:
            server.end(draw.choice(server.running), is_insert=draw.random() < 0.7)
        if room <= 4 or draw.random() < 0.1:
            server.tree.evict(EvictParams(num_tokens=draw.randrange(1, 20) * PAGE_SIZE))
        server.check()
    for req in list(server.running):
        server.end(req)
    server.tree.evict(EvictParams(num_tokens=VIRTUAL * PAGE_SIZE))
    server.check()
    assert len(server.allocator.free_pages) == VIRTUAL


def test_salts_are_apart_and_share_with_themselves(server: Server) -> None:
    """Requests that share a prefix while both run: holds move to the tree's pages before SGLang frees the others."""
    one = server.come("a", text(1, 300), salt="x")
    two = server.come("b", text(1, 300), blind=True, salt="x")
    other = server.come("c", text(1, 300), salt="y")
    pages = {rid: server.runtime.requests[rid].pages[:4].tolist() for rid in ("a", "b", "c")}
    assert pages["a"] == pages["b"]
    assert not set(pages["a"]).intersection(pages["c"])
    server.check()
    for req in (one, two, other):
        server.end(req)
        server.check()


def test_without_a_tree() -> None:
    server = Server(guarded=True, disable=True)
    assert type(server.tree).__name__ == ("LSACheckpointCache" if RELEASE.checkpoints else "LSAChunkCache")
    req = server.come("a", text(1, 300), chunk=128)
    server.answer(req, text(2, 50))
    server.check()
    server.end(req)
    server.check()
    assert len(server.allocator.free_pages) == VIRTUAL


# --- what is not known -----------------------------------------------------------------------------------------------


def test_what_nobody_noted_is_read_and_counted() -> None:
    index = PageIndex(PAGE_SIZE)
    slots = torch.cat([torch.arange(64) + 64 * page for page in (7, 3)])[:100]
    assert index.pages(slots).tolist() == [7, 3]
    assert index.pages(slots[30:70]).tolist() == [7, 3]
    assert index.matched(slots[:64], []).tolist() == [7]
    assert index.reads == 3


def test_a_row_is_known_while_it_is_open_and_as_far_as_its_pages_go() -> None:
    index = PageIndex(PAGE_SIZE)
    table = torch.arange(4 * 256).reshape(4, 256).as_subclass(OnDevice)
    with index.row(table[2], np.array([70, 80, 90])):
        assert index.pages(table[2, :192]).tolist() == [70, 80, 90]
        assert index.pages(table[2, 64:65]).tolist() == [80]
        assert index.pages(table[2][100:129]).tolist() == [80, 90]
        for slots in (table[2, :193], table[1, :64], table[2, ::64], table[:, 0], table[2, :64].clone()):
            with pytest.raises(AssertionError, match="waits"):
                index.pages(slots)
    with pytest.raises(AssertionError, match="waits"):
        index.pages(table[2, :64])


def test_a_tensor_that_is_gone_is_forgotten() -> None:
    index = PageIndex(PAGE_SIZE)
    slots = torch.arange(64)
    index.note(slots, np.array([1]))
    assert len(index._known) == 1
    del slots
    assert len(index._known) == 0


def test_a_wrong_note_is_refused_or_found() -> None:
    index = PageIndex(PAGE_SIZE)
    slots = torch.arange(64, 192)
    with pytest.raises(ValueError, match="128 slots are not those of 1 pages of 64"):
        index.note(slots, np.array([1]))
    index.note(slots, np.array([1, 3]))
    index.checked = True
    with pytest.raises(RuntimeError, match=r"the host knows pages \[1, 3\] where the device has \[1, 2\]"):
        index.pages(slots)


def test_pages_of_a_request_that_was_never_computed() -> None:
    server = Server(guarded=True)
    server.runtime.requests["a"] = Request("a", 3, Asked("quest", 0.5), pages=np.arange(1, 5))
    assert server.runtime.shared.known("b", 3) is None
    assert server.runtime.shared.known("a", 2) is None, "a name that is used again"
    found = server.runtime.shared.known("a", 3)
    assert found is not None and len(found) == pages_spanned(256, PAGE_SIZE)
