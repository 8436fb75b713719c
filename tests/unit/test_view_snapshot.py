"""The live view without a server: where pages are, what a snapshot holds and how large it can be, the tree."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.groups import Group
from sglang_lsa.engine.request import Asked, Request, Residency
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.ledger import Ledger
from sglang_lsa.memory.pager import Pager
from sglang_lsa.serve.view import snapshot as snapshot_module
from sglang_lsa.serve.view import tree as tree_module
from sglang_lsa.serve.view.answer import snapshot_text
from sglang_lsa.serve.view.events import encode_event
from sglang_lsa.serve.view.snapshot import (
    ARRIVING,
    CACHED,
    HOST,
    MOST_COLUMNS,
    MOST_REQUESTS,
    RECALLED,
    RESIDENT,
    SINK,
    describe_group,
    encode,
    page_states,
    pages_per_column,
    snapshot,
)
from sglang_lsa.serve.view.tree import TreePicture


def make_runtime(physical: int = 12, virtual: int = 40, rows: int = 4, **options: object) -> LSARuntime:
    keys, values = ([torch.zeros((physical + 1) * PAGE_SIZE, 1, 2)] for _ in range(2))
    table = torch.zeros((rows, (virtual + 1) * PAGE_SIZE), dtype=torch.int32)
    config = LSAConfig(**{"min_pages": 1, "floor_tokens": 0, **options})
    return LSARuntime(config, Pager(MhaLayout(keys, values, PAGE_SIZE), virtual), table, 2, 1.0)


def add_request(runtime: LSARuntime, rid: str, pages: np.ndarray, **fields: Any) -> Request:
    reads = Residency(**{name: fields.pop(name) for name in ("tail_start", "set_asked") if name in fields})
    request = Request(rid, 1, Asked("quest", 0.5), tokens=len(pages) * PAGE_SIZE, pages=pages, resident=reads, **fields)
    runtime.requests[rid] = request
    return request


def mirrored(runtime: LSARuntime, pages: np.ndarray, holder: str = "writer") -> None:
    """These pages are written, mirrored, and needed by nobody; they stay on the device for now."""
    runtime.pager.ledger.allocate(pages)
    assert runtime.pager.hold(holder, pages)
    runtime.pager.store(pages)
    runtime.pager.forget(holder)


# --- where pages are -------------------------------------------------------------------------------------------------


def test_states_of_pages() -> None:
    """A request of 10 pages on a device of 12: 6 others push some of its pages out, and two of those are recalled."""
    runtime = make_runtime()
    ledger = runtime.pager.ledger
    own, others = np.arange(1, 11), np.arange(20, 26)
    mirrored(runtime, own)
    mirrored(runtime, others)  # 12 device pages: 4 of the request's pages left
    runtime.pager.ledger.forward_finished(ledger.forward_started())
    gone = own[~ledger.on_device(own)]
    assert len(gone) == 4
    request = add_request(runtime, "r", own, window=1, tail_start=9, set_asked=ledger.passes)
    request.resident.positions = np.union1d([0], gone[:2] - 1)  # page ids are positions + 1
    assert runtime.pager.hold("r", request.read_pages())
    (states,) = page_states(runtime, [request])
    assert states[0] == SINK
    assert states[9] == RESIDENT  # its tail
    assert {int(page) - 1 for page in gone[:2] if page != 1} == set(np.flatnonzero(states == RECALLED).tolist())
    absent = np.flatnonzero(~ledger.on_device(own))
    assert (states[absent] == HOST).all()
    rest = sorted(set(range(10)) - {0, 9} - set((gone[:2] - 1).tolist()) - set(absent.tolist()))
    assert len(rest) > 0 and (states[rest] == CACHED).all()
    ledger._arriving[ledger.v2p[own[9]]] = True  # what a copy in flight does on a GPU
    assert page_states(runtime, [request])[0][9] == ARRIVING


def test_what_an_earlier_window_recalled_is_resident() -> None:
    runtime = make_runtime()
    ledger = runtime.pager.ledger
    own = np.arange(1, 9)
    mirrored(runtime, own)
    mirrored(runtime, np.arange(20, 32))
    ledger.forward_finished(ledger.forward_started())
    assert not ledger.on_device(own).any()
    request = add_request(runtime, "r", own, window=1, tail_start=8, set_asked=ledger.passes)
    request.resident.positions = np.array([2, 3])
    assert runtime.pager.hold("r", own[[2, 3]])
    assert page_states(runtime, [request])[0][[2, 3]].tolist() == [RECALLED, RECALLED]
    ledger.forward_finished(ledger.forward_started())
    request.resident.set_asked = ledger.passes
    assert page_states(runtime, [request])[0][[2, 3]].tolist() == [RESIDENT, RESIDENT]
    request.resident.set_asked = 0  # it has no set yet: what its prompt's prefix recalled is for no window
    assert page_states(runtime, [request])[0][[2, 3]].tolist() == [RESIDENT, RESIDENT]


def test_a_page_handed_out_again_was_never_recalled() -> None:
    ledger = Ledger(8, 2)
    ledger.allocate([1, 2])
    ledger.hold("a", [1, 2])
    ledger.mirrored([1, 2])
    ledger.drop("a")
    ledger.allocate([3, 4])
    ledger.hold("b", [3, 4])
    ledger.drop("b")
    ledger.mirrored([3, 4])
    ledger.forward_started()
    ledger.forward_finished(1)
    ledger.hold("a", [1])
    assert ledger.recalled([1, 2]).tolist() == [1, -1]
    ledger.drop("a")
    ledger.release([1])
    ledger.allocate([1])
    assert ledger.recalled([1]).tolist() == [-1]


def test_a_streamed_prompt_reads_what_is_not_here() -> None:
    runtime = make_runtime()
    own = np.arange(1, 9)
    mirrored(runtime, own)
    mirrored(runtime, np.arange(20, 32))
    request = add_request(runtime, "r", own)  # no set yet: everything from page 0 on
    (states,) = page_states(runtime, [request])
    assert (states == HOST).all()
    assert snapshot(runtime)["requests"][0]["phase"] == "prefill"


# --- maps ------------------------------------------------------------------------------------------------------------


def decode(text: str) -> list[tuple[int, int | None]]:
    """State and share of each column, read as the page does."""
    codes = [ord(character) - 48 for character in text]
    return [(code, None) if code < 3 else (3 + (code - 3) // 10, (code - 3) % 10 + 1) for code in codes]


def test_encode_one_page_a_column() -> None:
    states = np.array([SINK, HOST, CACHED, ARRIVING, RESIDENT, RECALLED], dtype=np.uint8)
    assert decode(encode(states, 1)) == [(5, 10), (0, None), (1, None), (2, None), (3, 10), (4, 10)]
    assert encode(states[:0], 1) == ""


def test_encode_several_pages_a_column() -> None:
    states = np.array(
        [HOST, HOST, HOST, HOST, RESIDENT, HOST, HOST, RECALLED, CACHED, HOST, HOST, ARRIVING, RESIDENT], dtype=np.uint8
    )
    assert decode(encode(states, 4)) == [(HOST, None), (RECALLED, 5), (ARRIVING, None), (RESIDENT, 10)]
    one_of_many = np.array([RESIDENT] + [HOST] * 31, dtype=np.uint8)
    assert decode(encode(one_of_many, 32)) == [(RESIDENT, 1)], "one page of many is still seen"


@pytest.mark.parametrize("pages", [1, 63, 511, 512, 513, 1024, 1025, 5000, 16384, 100_000])
def test_maps_are_bounded(pages: int) -> None:
    column = pages_per_column(pages)
    states = np.random.default_rng(pages).integers(0, 6, pages).astype(np.uint8)
    text = encode(states, column)
    assert MOST_COLUMNS // 2 < len(text) <= MOST_COLUMNS or column == 1
    assert len(text) == -(-pages // column) <= MOST_COLUMNS
    assert column & (column - 1) == 0
    assert [state for state, _ in decode(text)] == [
        int(states[start : start + column].max()) for start in range(0, pages, column)
    ]
    assert not set(text) & {'"', "\\"} and text.isascii(), "JSON needs no escapes"


@pytest.mark.parametrize("pages", [1, 10, 512, 513, 5000, 100_000])
def test_maps_of_groups(pages: int) -> None:
    """Up to the last page that is read together, in columns as wide as those of a request of that length, or finer."""
    positions = np.unique(np.random.default_rng(pages).integers(0, pages, max(1, pages // 3)))
    found = describe_group(Group((1, 4), positions, 2 * len(positions) - 1, 0.0))
    assert (found["members"], found["pages"], found["chosen"]) == (2, len(positions), 2 * len(positions) - 1)
    column, text = found["column"], found["map"]
    assert column & (column - 1) == 0 and column <= pages_per_column(pages)
    assert len(text) == positions[-1] // column + 1 <= MOST_COLUMNS
    for number, character in enumerate(text):
        within = ((positions >= number * column) & (positions < (number + 1) * column)).sum()
        assert ord(character) - ord("0") == -(-within * 10 // column)
    assert not set(text) & {'"', "\\"} and text.isascii(), "JSON needs no escapes"


# --- snapshots -------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_plain_json_on_one_line() -> None:
    runtime = make_runtime()
    mirrored(runtime, np.arange(1, 6))
    add_request(runtime, 'a"\n\ndata: <img src=x onerror=alert(1)>', np.arange(1, 6), window=0, tail_start=4)
    text = snapshot_text(runtime, SimpleNamespace())
    seen = json.loads(text)
    assert seen["requests"][0]["rid"].startswith('a"\n\ndata: <img')
    assert seen["tree"] == {"nodes": [], "more": 0}
    event = encode_event(text)
    assert event.count(b"\n") == 2 and event.endswith(b"\n\n"), "an id cannot end an event"
    assert seen["values"]["device_pages"] == 12


def test_snapshots_are_bounded() -> None:
    """200 requests of 4,000 pages with ids of 10,000 characters."""
    runtime = make_runtime(physical=100, virtual=4200, rows=2)
    ledger = runtime.pager.ledger
    pages = np.arange(1, 4001)
    ledger.allocate(pages)
    for number in range(200):
        add_request(runtime, f"{number:05d}" * 2000, pages, window=1, tail_start=3999)
    text = snapshot_text(runtime, SimpleNamespace())
    seen = json.loads(text)
    assert len(seen["requests"]) == MOST_REQUESTS and seen["more_requests"] == 200 - MOST_REQUESTS
    assert max(len(request["rid"]) for request in seen["requests"]) <= snapshot_module.LONGEST_NAME
    assert len(text) < MOST_REQUESTS * (MOST_COLUMNS + 600) + 4000


def test_a_snapshot_that_fails_says_so(caplog: pytest.LogCaptureFixture) -> None:
    runtime = make_runtime()
    add_request(runtime, "r", np.array([99]))  # a page that there is not
    assert "could not describe itself" in json.loads(snapshot_text(runtime, SimpleNamespace()))["error"]
    assert "snapshot for the live view failed" in caplog.text


def test_a_snapshot_changes_nothing() -> None:
    runtime = make_runtime()
    mirrored(runtime, np.arange(1, 6))
    request = add_request(runtime, "r", np.arange(1, 6), window=0, tail_start=4)
    request.resident.positions = np.array([0, 2])
    before = [array.copy() for array in (runtime.pager.ledger.v2p, runtime.pager.ledger.heat.values)]
    first = snapshot(runtime)
    second = snapshot(runtime)
    assert {**first, "time": 0} == {**second, "time": 0}
    assert all(
        (a == b).all()
        for a, b in zip(before, (runtime.pager.ledger.v2p, runtime.pager.ledger.heat.values), strict=True)
    )
    assert request.resident.positions.tolist() == [0, 2]


# --- the tree --------------------------------------------------------------------------------------------------------


class Tree:
    """Nodes as SGLang's ``RadixCache`` has them; virtual page 1 + n is the n-th that is handed out."""

    def __init__(self) -> None:
        self.next, self.ids = 1, 0
        self.root_node = self._node(None, 0)

    def _node(self, parent: Any, pages: int) -> Any:
        slots = torch.arange(self.next * PAGE_SIZE, (self.next + pages) * PAGE_SIZE)
        self.next += pages
        self.ids += 1
        return SimpleNamespace(id=self.ids, parent=parent, children={}, value=slots, lock_ref=0)

    def add(self, parent: Any, pages: int) -> Any:
        node = self._node(parent, pages)
        parent.children[node.id] = node
        return node

    def split(self, node: Any, pages: int) -> Any:
        """As SGLang does: the first part is a new node, the rest keeps its identity."""
        first = self._node(node.parent, 0)
        first.value, node.value = node.value[: pages * PAGE_SIZE], node.value[pages * PAGE_SIZE :]
        del node.parent.children[node.id]
        first.parent.children[first.id] = first
        first.children[node.id] = node
        node.parent = first
        return first


def test_the_tree() -> None:
    tree, ledger = Tree(), Ledger(40, 10)
    system = tree.add(tree.root_node, 4)
    agent = tree.add(system, 2)
    tree.add(tree.root_node, 3)
    pages = np.arange(1, 10)
    ledger.allocate(pages)
    ledger.hold("a", pages)
    ledger.mirrored(pages)
    ledger.heat.select(np.array([2]))
    ledger.heat.select(np.array([2]))
    system.lock_ref, agent.lock_ref = 2, 1
    picture = TreePicture()
    nodes = picture.take(tree, ledger)["nodes"]
    assert [node[:3] for node in nodes] == [[-1, 4, 2], [-1, 3, 0], [0, 2, 1]]
    assert nodes[0][3] == pytest.approx(2, abs=0.01) and nodes[1][3] == 0
    assert [node[4:] for node in nodes] == [[4, 4], [3, 3], [2, 2]]
    tree.split(system, 1)
    nodes = picture.take(tree, ledger)["nodes"]
    assert [node[:3] for node in nodes] == [[-1, 3, 0], [-1, 1, 0], [1, 3, 2], [2, 2, 1]]
    assert nodes[1][3] == 0 and nodes[2][3] > 1, "the hot page is in the second part"


def test_the_picture_of_a_large_tree_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MOST_VISITED", 1500)
    tree, ledger = Tree(), Ledger(3000, 2000)
    prefixes = [tree.add(tree.root_node, 1) for _ in range(20)]
    leaves = [tree.add(prefix, 1) for prefix in prefixes for _ in range(90)]
    ledger.allocate(np.arange(1, tree.next))
    read = leaves[777]
    read.lock_ref = read.parent.lock_ref = 1
    picture = TreePicture()
    for _ in range(8):  # some of them are learned each time
        shown = picture.take(tree, ledger)
    assert len(shown["nodes"]) == tree_module.MOST_NODES
    assert shown["more"] == 1820 - tree_module.MOST_NODES
    assert sum(node[2] for node in shown["nodes"]) == 2, "what is being read is shown"
    assert all(node[0] < position for position, node in enumerate(shown["nodes"]))
    assert len(picture._pages) <= 1500
    for prefix in prefixes:
        prefix.children.clear()
    assert picture.take(tree, ledger)["more"] == 0
    assert len(picture._pages) == 20, "nodes that are gone are forgotten"
