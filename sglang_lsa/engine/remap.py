"""remap: what decode attention reads of each request. Writes the resident table and what requests know of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_lsa.engine.request import Request, Window
from sglang_lsa.engine.selection import Watched
from sglang_lsa.memory.ledger import Ledger
from sglang_lsa.memory.resident_table import ResidentTable


class ResidentSets:
    """The only one that writes the resident table, so that it and the requests say the same."""

    def __init__(self, table: ResidentTable, ledger: Ledger):
        self.table, self.ledger = table, ledger
        self.incomplete: dict[str, Request] = {}
        """Requests that cannot decode before they have a resident set."""
        self.changes = 0
        """How often what somebody reads changed."""

    def enter(self, row: int) -> None:
        """A request has this row now. Until its first window is predicted it reads all of its pages."""
        self.changes += 1
        self.table.remap(row, np.zeros(0, dtype=np.int64), 0)

    def await_first(self, request: Request) -> None:
        """Some pages of this request have left the device: it cannot decode before it has a resident set."""
        request.resident.incomplete = True
        self.incomplete[request.key] = request

    def remap(
        self,
        request: Request,
        positions: np.ndarray,
        tail_start: int,
        ranks: np.ndarray | None = None,
        watched: Watched | None = None,
        written: bool = False,
    ) -> None:
        """Let decode attention read the pages at ``positions`` and everything from ``tail_start`` pages on.

        ``written``: the table has that already, from :meth:`write_all`.
        """
        self.changes += 1
        still_dense = request.resident.tail_start == tail_start == 0
        if not still_dense and not written:
            self.table.remap(request.row, self.ledger.v2p[request.pages[positions]], tail_start)
        request.resident.positions, request.resident.tail_start, request.resident.ranks = positions, tail_start, ranks
        if request.resident.incomplete:
            request.resident.incomplete = False
            del self.incomplete[request.key]
        if request.unread is not None:
            request.story.windows.pop()
        request.unread = Window(tail_start, positions, watched=watched)
        request.story.windows.append(request.unread)

    def write_all(self, sets: Sequence[tuple[Request, np.ndarray, int]]) -> None:
        """The table's part of :meth:`remap` for several requests, in one copy.

        Args:
            sets: of each request its positions and where its tail starts.
        """
        changed = [one for one in sets if one[0].resident.tail_start or one[2]]  # others stay dense
        self.table.remap_all(
            np.array([request.row for request, _, _ in changed], dtype=np.int64),
            [self.ledger.v2p[request.pages[positions]] for request, positions, _ in changed],
            np.array([tail_start for _, _, tail_start in changed], dtype=np.int64),
        )

    def restore(self, request: Request) -> None:
        """The table has another set than the request, which goes on with its own."""
        own = request.resident
        self.table.remap(request.row, self.ledger.v2p[request.pages[own.positions]], own.tail_start)

    def moved(self, request: Request) -> None:
        """The same tokens of this request are in other pages now."""
        self.changes += 1
        if request.resident.tail_start:
            self.table.remap(
                request.row, self.ledger.v2p[request.pages[request.resident.positions]], request.resident.tail_start
            )

    def forget(self, request: Request) -> None:
        """The request is gone."""
        self.changes += 1
        self.incomplete.pop(request.key, None)
