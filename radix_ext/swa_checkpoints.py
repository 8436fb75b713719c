"""Checkpoints: places in the tree that keep their window longest, so that a prompt which leaves there finds its prefix.

A prefix is found only up to a place with a live window before it. SGLang gives windows up, least recently used first,
when their pool is full, and then a question after a long document that others asked about may find nothing of it. So
one window is kept every 32K tokens, and one at the end of each prompt: nothing else is left once the pool is full, and
they go last. They are never locked: running requests come first. Neither kind displaces the other while it has no more
than half of the places: many short prompts leave a document its checkpoints.
"""

from __future__ import annotations

from typing import Any

SPACING = 32_768
"""Tokens between two checkpoints of a prompt."""


class Checkpoints:
    """Nodes, by number, that end with a window to keep; the longest unused first.

    Args:
        component: SGLang's part of the tree that knows windows.
        tail: tokens of the smallest node that has a window, in whole pages.
        most: how many there may be; beyond that the longest unused one is forgotten, of the ends of prompts if these
            are more than half.
    """

    def __init__(self, component: Any, tail: int, most: int, spacing: int = SPACING):
        self.component, self.tail, self.most = component, tail, most
        self.spacing = max(spacing // tail, 1) * tail
        self._inner: dict[int, None] = {}
        self._ends: dict[int, None] = {}

    def __contains__(self, node: Any) -> bool:
        return node.id in self._inner or node.id in self._ends

    def __len__(self) -> int:
        return len(self._inner) + len(self._ends)

    def keep(self, node: Any, of: Any = None) -> None:
        """``node`` ends at a checkpoint, which is used now.

        Args:
            of: the checkpoint that it is a part of; itself if it is one already.
        """
        inner = (node if of is None else of).id in self._inner
        self._keep(node, self._inner if inner else self._ends)

    def forget(self, node: Any) -> None:
        """Its window is gone."""
        self._inner.pop(node.id, None)
        self._ends.pop(node.id, None)

    def clear(self) -> None:
        self._inner.clear()
        self._ends.clear()

    def mark(self, last: Any, found_again: int | None) -> None:
        """A prompt was inserted up to the node ``last``: choose the checkpoints on its way that it has not yet.

        Nodes are cut so that a checkpoint keeps a window and no more.

        Args:
            found_again: tokens that are looked up when the same prompt comes again; None while it is not complete.
        """
        end = kept = 0
        for node in self._path(last):
            start, end = end, end + len(node.key)
            if node.id in self._inner:
                kept = end
            while self._has_window(node) and end - kept >= self.spacing and end - start >= self.tail:
                kept = min(max(start + self.tail, kept + self.spacing), end)
                self._keep_until(node, kept - start, self._inner)
                start = kept
        if found_again is not None and self._has_window(last):
            if found_again < end and self._has_window(last.parent):
                self._keep_until(last.parent, len(last.parent.key), self._ends)
            self._keep_until(last, len(last.key), self._ends)

    def spare(self, tokens: int) -> None:
        """Windows of so many tokens are about to go, the least recently used first: let it be others."""
        windows = self.component.tree_core.lru_lists[self.component.component_type]
        node, spared = windows.get_lru_no_lock(), []
        while node is not None and tokens > 0:
            if node in self:
                spared.append(node)
            else:
                tokens -= len(node.key)
            node = windows.get_prev_no_lock(node)
        for node in spared:
            windows.reset_node_mru(node)

    # -- inside --------------------------------------------------------------------------------------------------

    def _keep(self, node: Any, kind: dict[int, None]) -> None:
        if kind is self._ends and node.id in self._inner:
            kind = self._inner  # that of a document may be the end of a prompt, too
        self.forget(node)
        kind[node.id] = None
        if len(self) > self.most:
            oldest = self._ends if len(self._ends) > self.most // 2 else self._inner
            del oldest[next(iter(oldest))]

    def _keep_until(self, node: Any, length: int, kind: dict[int, None]) -> None:
        """A checkpoint after so many tokens of ``node``, which goes on as the part behind it if there is one."""
        split = self.component.tree_core._split_node
        if length < len(node.key):
            node, _ = split(node.key, node, length)
        if length > self.tail:
            split(node.key, node, length - self.tail)
        self._keep(node, kind)

    def _has_window(self, node: Any) -> bool:
        return self.component.node_has_component_data(node)

    def _path(self, node: Any) -> list[Any]:
        """From the first node below the root to this one."""
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]
