"""Prefill attention that reads only some of the prefix in place: part by part, merged by log-sum-exps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_lsa.kernels.merge_states import merge_states

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime

State = tuple[torch.Tensor, torch.Tensor]
"""Attention over some keys, ``[tokens, q_heads, head_dim]``, and its log-sum-exps, base 2, ``[tokens, q_heads]``."""


class PartialPrefill(ABC):
    """The parts of a pass are its own tokens, the pages in place, and blocks of pages from the host.

    Each is planned once for all layers, with lengths that the host knows; blocks need two plans, for all but the last
    are of one size.
    """

    reads_raw = False
    """Blocks are read in the type in which the pool keeps KV."""

    def __init__(self, lsa: LSARuntime):
        self.lsa = lsa
        self.reads_here = False

    def plan(self, lengths: Sequence[int]) -> None:
        """Plan a pass that computes so many tokens of each of its requests."""
        step = self.lsa.step
        assert step.readings is not None
        self.plan_own(lengths)
        here = [self.lsa.pager.ledger.v2p[reading.here] for reading in step.readings]
        self.reads_here = any(map(len, here))
        if self.reads_here:
            self.plan_here(here, [reading.tokens_here for reading in step.readings])
        if step.staged is not None:
            self.plan_blocks((step.staged.sizes[0], step.staged.sizes[-1]))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer) -> torch.Tensor:
        """One layer of the pass: ``[tokens, q_heads * head_dim]`` in the type of ``q``."""
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        k, v = (t.view(-1, layer.tp_k_head_num, layer.head_dim) for t in (k, v))
        staged = self.lsa.step.staged
        out, lse = self.own(q, k, v, layer)
        out, lse = out.float(), lse.contiguous()
        if self.reads_here:
            merge_states(out, lse, *self.here(q, layer))
        blocks = staged.layer(layer.layer_id, self.reads_raw) if staged is not None else ()
        for block, (keys, values) in enumerate(blocks):
            last = staged is not None and block + 1 == len(staged.sizes)
            merge_states(out, lse, *self.block(q, keys, values, layer, last))
        return out.to(q.dtype).view(len(q), -1)

    @abstractmethod
    def plan_own(self, lengths: Sequence[int]) -> None:
        """So many tokens of each request are new."""

    @abstractmethod
    def plan_here(self, pages: Sequence[np.ndarray], tokens: Sequence[int]) -> None:
        """Each request reads these physical pages in place, and so many tokens in them: the last may be begun only."""

    @abstractmethod
    def plan_blocks(self, sizes: tuple[int, int]) -> None:
        """Blocks from the host are of so many tokens, and the last one is."""

    @abstractmethod
    def own(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer) -> State:
        """Causal attention among the new tokens."""

    @abstractmethod
    def here(self, q: torch.Tensor, layer) -> State:
        """Attention to the pages in place."""

    @abstractmethod
    def block(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer, last: bool) -> State:
        """Attention to a block from the host, ``[tokens, kv_heads, head_dim]`` each; whether it is the last one."""


def offsets(lengths: Sequence[int]) -> np.ndarray:
    """Where each of several runs begins, and the last ends: int32 ``[n + 1]``."""
    return np.cumsum([0, *lengths], dtype=np.int32)
