"""Where an SGLang request says which KV it has: on itself (0.5.17), or in ``req.kv`` and the tree (0.5.23); and how far
its prefill is.

Imports no SGLang.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from sglang_lsa.memory.page_index import PageIndex
from sglang_lsa.patches.releases import installed


class OnRequest:
    """As of 0.5.17."""

    @staticmethod
    def row(req: Any) -> int:
        return req.req_pool_idx

    @staticmethod
    def committed(req: Any) -> int:
        return req.kv_committed_len

    @staticmethod
    def prefilled(req: Any) -> int:
        return req.extend_range.end

    @staticmethod
    def prefix(req: Any, index: PageIndex) -> np.ndarray:
        return index.matched(req.prefix_indices, slots_up_from(getattr(req, "last_node", None)))


class InRecord:
    """As of 0.5.23."""

    @staticmethod
    def row(req: Any) -> int:
        return req.kv.req_pool_idx

    @staticmethod
    def committed(req: Any) -> int:
        return req.kv.kv_committed_len

    @staticmethod
    def prefilled(req: Any) -> int:
        return req.extend_end

    @staticmethod
    def prefix(req: Any, index: PageIndex) -> np.ndarray:
        path = list(slots_up_from(req.last_node))
        slots = torch.cat(path[::-1]) if path else torch.zeros(0, dtype=torch.int64)
        return index.matched(slots[: req.prefix_len], path)


@functools.cache
def _of_release() -> type[OnRequest] | type[InRecord]:
    return InRecord if installed().checkpoints else OnRequest


def row_of(req: Any) -> int:
    """Its row in SGLang's table."""
    return _of_release().row(req)


def committed_of(reqs: Iterable[Any]) -> list[int]:
    """Of each of these, tokens whose KV is there, or is being computed; asked before every decode step."""
    committed = _of_release().committed
    return [committed(req) for req in reqs]


def prefilled_of(req: Any) -> int:
    """Tokens of its prompt that were computed when its last prefill pass ended, or will be."""
    return _of_release().prefilled(req)


def prefix_of(req: Any, index: PageIndex) -> np.ndarray:
    """Virtual pages of the prefix that the radix tree had when it was asked last."""
    return _of_release().prefix(req, index)


def slots_up_from(node: Any) -> Iterator[torch.Tensor]:
    """Slots of each node of SGLang's radix tree, from ``node`` up to the last one below the root. None of a node that
    SGLang names by a number (``UnifiedRadixCache``): pages of its matches are noted with them."""
    while getattr(node, "parent", None) is not None:
        yield node.value
        node = node.parent
