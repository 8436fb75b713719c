"""attend, for groups on a GPU: FlashInfer's prefill kernels read a group's pages for the queries of all its members.

The plan is the host's, as for decode, and made anew only when groups change; a CUDA graph reads it from static buffers.
Steps without groups are planned, captured and replayed as if there were none (``engine/step.py``, ``captured``).
Tested on a CPU as far as it runs there, and on a GPU by ``tests/gpu/test_groups.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_lsa.attend.partial import State, offsets
from sglang_lsa.attend.plan_copies import PlanCopies
from sglang_lsa.engine.group_buffers import INT_WORKSPACE, GraphBuffers, planning_bytes, room_for
from sglang_lsa.engine.grouping import Grouping
from sglang_lsa.memory.transfer import upload

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


@dataclass(frozen=True, eq=False)
class Plan:
    """What FlashInfer is told of the groups of a step: queries in the order of the groups, and pages of each.

    Attributes:
        queries: int32 ``[groups + 1]``, where the queries of each group begin.
        pages: int32 ``[groups + 1]``, where the pages of each group begin.
        indices: int32, physical pages, group after group.
        last: int32 ``[groups]``, tokens in each group's last page; 0 where there is none.
    """

    queries: np.ndarray
    pages: np.ndarray
    indices: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, grouping: Grouping, page: int, room: int | None = None) -> Plan:
        """
        Args:
            room: groups that a CUDA graph has room for; those that are not there have no queries and no pages.
        """
        sizes, pages = list(grouping.sizes), list(grouping.pages)
        empty = (len(sizes) if room is None else room) - len(sizes)
        if empty < 0:
            raise RuntimeError(f"LSA: {len(sizes)} groups in a step of a CUDA graph that has room for {room}")
        return cls(
            offsets([*sizes, *[0] * empty]),
            offsets([*map(len, pages), *[0] * empty]),
            np.concatenate([np.zeros(0, dtype=np.int32), *pages]).astype(np.int32),
            np.array([page] * len(sizes) + [0] * empty, dtype=np.int32),
        )

    @classmethod
    def largest(cls, rows: int, page: int, room: int) -> Plan:
        """While a CUDA graph is captured: as many queries as there can be, in one group that reads the padding page."""
        others = [0] * (room - 1)
        last = np.array([page, *others], dtype=np.int32)
        return cls(offsets([rows, *others]), offsets([1, *others]), np.zeros(1, dtype=np.int32), last)


def rows_of(grouping: Grouping | None, rows: int) -> np.ndarray:
    """Static buffers of ``rows`` requests: in row 0 which query is in which place of the groups' order (0 in those that
    nobody is at), in row 1 which place each query has in it, -1 for those that are in no group, padding included.

    Returns:
        int64 ``[2, rows]``.
    """
    found = np.stack((np.zeros(rows, dtype=np.int64), np.full(rows, -1, dtype=np.int64)))
    if grouping is not None:
        found[0, : len(grouping.order)] = grouping.order
        found[1, : len(grouping.places)] = grouping.places
    return found


class ReadTogether:
    """Held by the FlashInfer backend where groups are formed. ``plan`` comes before every decode step, ``attend`` in
    each of its layers.

    Args:
        lsa: of the model runner.
        wrapper: makes a ``BatchPrefillWithPagedKVCacheWrapper`` over a workspace, with the arguments given.
        workspace: for what attention adds up; nothing stays in it from one call to the next, so others have it, too.
        shape: query heads, key heads, head_dim.
        types: of queries and of KV.
        copies: of the backend's plans.
    """

    def __init__(
        self,
        lsa: LSARuntime,
        wrapper: Callable[..., Any],
        workspace: torch.Tensor,
        shape: tuple[int, int, int],
        types: tuple[torch.dtype, torch.dtype],
        copies: PlanCopies,
    ):
        self.lsa, self.wrapper, self.workspace, self.shape, self.types = lsa, wrapper, workspace, shape, types
        self.copies = copies
        self.graphs: dict[int, Any] = {}
        """By batch size, of CUDA graphs that read in groups."""
        self.eager: Any = None
        self.reads: Any = None
        """What the step that is planned reads its groups through; None where nothing is read together."""
        self.rows = 0
        """Queries that it takes, of those that :attr:`order` names."""
        self.order, self.places = self._buffers(lsa.table.rows)
        self._planned: tuple[Any, Grouping | None] = (None, None)
        self._plans: torch.Tensor | None = None
        """Where CUDA graphs have their plans, one at a time."""
        self._count()

    def reserve(self, batch: int) -> None:
        """CUDA graphs for up to so many requests are about to be captured."""
        if batch > len(self.order):
            self.order, self.places = self._buffers(batch)
            self._count()

    def plan(self, batch: int, graph: bool) -> None:
        """Plan a decode step of so many requests, padding included, and remember what reads its groups.

        Args:
            graph: it is a CUDA graph's, about to be captured or replayed.
        """
        step = self.lsa.step
        if not step.reads_together:
            self.reads = None
            return
        self.reads, grouping = self._of_graph(batch) if graph else self._of_eager(), step.grouping
        self.rows = batch if grouping is None or graph else len(grouping.order)
        if grouping is not None and self._planned[0] is self.reads and self._planned[1] is grouping:
            return
        page, room = self.lsa.pager.page, room_for(batch)
        if grouping is None:
            found = Plan.largest(batch, page, room)
        else:
            found = Plan.of(grouping, page, room if graph else None)
        self._planned = None, None  # if this fails
        self._tell(self.reads, found)
        both = upload(rows_of(grouping, len(self.order)), self.order.device)
        self.order.copy_(both[0])
        self.places.copy_(both[1])
        self._planned = self.reads, grouping

    def has_captured(self, batch: int) -> bool:
        """Whether a CUDA graph for so many requests reads in groups, so that another one that does not is next."""
        return batch in self.graphs and not self.lsa.step.reads_together

    def attend(self, q: torch.Tensor, pool: tuple[torch.Tensor, ...], **options: Any) -> State:
        """Attention of the members' queries to what their groups read, in the groups' order; rows beyond the members
        that the step has hold anything.

        Args:
            q: ``[batch, q_heads, head_dim]``.
            pool: keys and values of the layer, ``[slots, kv_heads, head_dim]`` each.
        """
        paged = tuple(buffer.view(-1, self.lsa.pager.page, *buffer.shape[1:]) for buffer in pool)
        members = q.index_select(0, self.order[: self.rows])
        return self.reads.forward_return_lse(members, paged, causal=False, **options)

    def _tell(self, wrapper: Any, plan: Plan) -> None:
        with self.copies.planning(wrapper):
            wrapper.plan(
                torch.from_numpy(plan.queries),
                torch.from_numpy(plan.pages),
                upload(plan.indices, self.order.device),
                torch.from_numpy(plan.last),
                *self.shape,
                self.lsa.pager.page,
                q_data_type=self.types[0],
                kv_data_type=self.types[1],
            )

    def _of_graph(self, batch: int) -> Any:
        if batch not in self.graphs:
            device = self.order.device
            sizes = GraphBuffers.of(batch, self.lsa.pager.ledger.physical_pages)
            queries, pages, indices, last = (torch.zeros(size, dtype=torch.int32, device=device) for size in sizes)
            wrapper = self.wrapper(
                self.workspace,
                use_cuda_graph=True,
                qo_indptr_buf=queries,
                paged_kv_indptr_buf=pages,
                paged_kv_indices_buf=indices,
                paged_kv_last_page_len_buf=last,
            )
            if self._plans is None:
                self._plans = torch.empty(INT_WORKSPACE, dtype=torch.uint8, device=device)
            wrapper.reset_workspace_buffer(self.workspace, self._plans)
            self.graphs[batch] = wrapper
            self._count()
        return self.graphs[batch]

    def _of_eager(self) -> Any:
        if self.eager is None:
            self.eager = self.wrapper(self.workspace)
        return self.eager

    def _count(self) -> None:
        """Have the status know how much device memory plans take, of the graphs that were captured so far."""
        pages = self.lsa.pager.ledger.physical_pages
        assert self.lsa.groups is not None
        self.lsa.groups.planning_bytes = planning_bytes(len(self.order), tuple(self.graphs), pages)

    def _buffers(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.from_numpy(rows_of(None, rows)).to(self.lsa.pager.device)
        return both[0], both[1]
