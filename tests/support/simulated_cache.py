"""SGLang's allocator and radix tree, by pages: what they hand out, share, lock and evict; no SGLang in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_lsa.memory.pager import Pager

NONE = np.zeros(0, dtype=np.int64)


class Allocator:
    """Virtual pages, last in first out, so that pages come back soon; tells the ledger as the real one does."""

    def __init__(self, pager: Pager):
        self.ledger = pager.ledger
        self.free = list(range(pager.ledger.virtual_pages, 0, -1))
        self._new: list[np.ndarray] = []

    def allocate(self, count: int) -> list[int]:
        assert count <= len(self.free), f"{count} pages of {len(self.free)}"
        pages = [self.free.pop() for _ in range(count)]
        if pages:
            self.ledger.allocate(np.array(pages))
            self._new.append(np.array(pages))
        return pages

    def release(self, pages: list[int]) -> None:
        if pages:
            self.ledger.release(np.array(pages))
            self.free += pages

    def take_new_pages(self) -> np.ndarray:
        pages, self._new = self._new, []
        return np.concatenate((NONE, *pages))


@dataclass
class Node:
    """A page of the tree."""

    page: int
    parent: Node | None
    key: int
    children: dict[int, Node] = field(default_factory=dict)
    locks: int = 0
    used: int = 0

    def line(self) -> list[Node]:
        """From the root to this one."""
        return [*(self.parent.line() if self.parent is not None and self.parent.page else []), self]


class Tree:
    """A radix tree of which every node is a page. Eviction takes the least recently used leaf that nobody locked."""

    def __init__(self, allocator: Allocator):
        self.allocator = allocator
        self.root = Node(0, None, 0)
        self.nodes: list[Node] = []
        self._clock = 0

    def match(self, keys: Sequence[int]) -> list[Node]:
        """The longest known prefix, in complete pages."""
        found, node = [], self.root
        for key in keys:
            if key not in node.children:
                break
            node = node.children[key]
            found.append(node)
            self._use(node)
        return found

    def insert(self, keys: Sequence[int], pages: list[int]) -> tuple[list[Node], list[int]]:
        """Add ``pages`` where the tree has none. Returns the nodes, and those of ``pages`` that it did not take."""
        nodes, duplicates, node = [], [], self.root
        for key, page in zip(keys, pages, strict=False):
            if key not in node.children:
                child = node.children[key] = Node(page, node, key)
                self.nodes.append(child)
            elif node.children[key].page != page:
                duplicates.append(page)
            node = node.children[key]
            self._use(node)
            nodes.append(node)
        return nodes, duplicates

    def evict(self, count: int) -> int:
        """Returns how many pages were given back."""
        taken = 0
        while taken < count and (leaves := [node for node in self.nodes if not node.children and not node.locks]):
            leaf = min(leaves, key=lambda node: node.used)
            assert leaf.parent is not None
            del leaf.parent.children[leaf.key]
            self.nodes.remove(leaf)
            self.allocator.release([leaf.page])
            taken += 1
        return taken

    def _use(self, node: Node) -> None:
        self._clock += 1
        node.used = self._clock


def keys_of(text: np.ndarray) -> list[int]:
    """By what the tree knows pages with this content, ``[pages, page]``."""
    return [hash(page.tobytes()) for page in text]
