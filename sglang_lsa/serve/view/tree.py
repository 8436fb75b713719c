"""The radix tree as the live view draws it: its warmest prefixes, with who reads them and where their pages are."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.ledger import Ledger
from sglang_lsa.memory.pages import pages_of

MOST_NODES = 256
"""Nodes in one picture."""
MOST_VISITED = 2048
"""Nodes that are looked at for it, breadth first."""
MOST_LEARNED = 256
"""Nodes whose pages are asked for at a time."""
FIELDS = ("parent", "pages", "readers", "heat", "device_pages", "host_pages")
"""What each node of a picture is, in order: the number of its parent in the picture (-1: it starts at the beginning of
prompts), its pages, the running requests that read through it, the heat of its hottest page in selections made just
now, and where its pages are."""


class TreePicture:
    """Remembers which virtual pages each node holds: SGLang keeps that on the device, and reading it makes it wait."""

    def __init__(self) -> None:
        self._pages: dict[int, np.ndarray] = {}

    def take(self, tree: Any, ledger: Ledger, page: int = PAGE_SIZE) -> dict[str, Any]:
        """Nodes as rows of :data:`FIELDS`, parents before their children; how many are left out.

        Args:
            tree: SGLang's cache; one without a tree has no nodes.
            page: tokens of a page.
        """
        root = getattr(tree, "root_node", None)
        visited, unseen = _walk(root) if root is not None else ([], 0)
        self._learn(visited, page)
        known = [node for node in visited if node.id in self._pages]
        kept = _kept(known, self._figures(known, ledger)[:, 0], root)
        rows = self._figures(kept, ledger)
        number = {node.id: position for position, node in enumerate(kept)}
        nodes = [
            [
                number.get(node.parent.id, -1),
                len(self._pages[node.id]),
                node.lock_ref,
                round(float(heat), 3),
                int(device),
                int(host),
            ]
            for node, (heat, device, host) in zip(kept, rows.tolist(), strict=True)
        ]
        return {"nodes": nodes, "more": len(visited) - len(kept) + unseen}

    def _learn(self, nodes: list[Any], page: int) -> None:
        """Pages of nodes that are new or were split since; one wait for all of them."""
        sizes = {node.id: len(node.value) // page for node in nodes}
        self._pages = {number: pages for number, pages in self._pages.items() if len(pages) == sizes.get(number)}
        new = [node for node in nodes if node.id not in self._pages and sizes[node.id]][:MOST_LEARNED]
        if new:
            pages = pages_of(torch.cat([node.value[::page] for node in new]), page)
            parts = np.split(pages, np.cumsum([sizes[node.id] for node in new])[:-1])
            self._pages.update({node.id: part for node, part in zip(new, parts, strict=True)})

    def _figures(self, nodes: list[Any], ledger: Ledger) -> np.ndarray:
        """float64 ``[nodes, 3]``: heat of the hottest page, pages on the device, pages in the host mirror."""
        if not nodes:
            return np.zeros((0, 3))
        parts = [self._pages[node.id] for node in nodes]
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        pages = np.concatenate(parts)
        return np.stack(
            (
                np.maximum.reduceat(ledger.heat.relative(pages), starts),
                np.add.reduceat(ledger.on_device(pages).astype(np.float64), starts),
                np.add.reduceat(ledger.is_mirrored(pages).astype(np.float64), starts),
            ),
            axis=1,
        )


def _walk(root: Any) -> tuple[list[Any], int]:
    """Nodes below ``root``, breadth first, and how many children of theirs were not looked at."""
    visited: list[Any] = []
    waiting = deque(root.children.values())
    while waiting and len(visited) < MOST_VISITED:
        node = waiting.popleft()
        if node.value is not None:
            visited.append(node)
        waiting.extend(node.children.values())
    return visited, len(waiting)


def _kept(nodes: list[Any], heat: np.ndarray, root: Any) -> list[Any]:
    """At most :data:`MOST_NODES`, read ones first and then the hottest, never one without its parents; in the order of
    ``nodes``."""
    if len(nodes) <= MOST_NODES:
        chosen = {node.id for node in nodes}
    else:
        chosen = set()
        best = sorted(range(len(nodes)), key=lambda index: (-(nodes[index].lock_ref > 0), -heat[index], index))
        for index in best:
            path, node = [], nodes[index]
            while node is not root and node.id not in chosen:
                path.append(node.id)
                node = node.parent
            if len(chosen) + len(path) <= MOST_NODES:
                chosen.update(path)
    kept: list[Any] = []
    shown = {root.id} if root is not None else set()
    for node in nodes:  # a node whose parent's pages are not known yet waits with it
        if node.id in chosen and node.parent.id in shown:
            kept.append(node)
            shown.add(node.id)
    return kept
