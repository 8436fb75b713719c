"""A server whose admission is asked, and how a request was admitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import harness
import numpy as np

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.admission import Admission, Admitted
from sglang_lsa.engine.lookahead import Lookahead
from sglang_lsa.engine.policies import Recency
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.patches.requests import choose

PHYSICAL, VIRTUAL = 24, 200
CHUNK = 4 * PAGE_SIZE


class Server(harness.Server):
    """Admission over a real pager and lookahead; a set is half of a request unless told otherwise."""

    def __init__(
        self, chunk: int | None = CHUNK, physical: int = PHYSICAL, page: int = PAGE_SIZE, **options: object
    ) -> None:
        super().__init__(physical, VIRTUAL, page)
        defaults = {"budget": 0.5, "min_pages": 1, "floor_tokens": 0, "min_context": CHUNK, "policy": "recency"}
        self.config = LSAConfig(**{**defaults, **options})
        table = ResidentTable(4, physical // 2 + 1, page)
        self.lookahead = Lookahead(self.config, self.pager, table, {"recency": Recency()})
        self.admission = Admission(self.pager, self.lookahead.rules, chunk)
        self.chunk = chunk

    def memory_in_the_mirror_only(self, count: int) -> np.ndarray:
        pages = self.memory(count)
        self.push_off()
        assert not self.ledger.on_device(pages).any()
        return pages

    def choose(self, req: Any, running: int = 0, batch: Sequence[str] = (), chunk: int | None = -1) -> Admitted | None:
        return choose(self.admission, req, running, batch, self.chunk if chunk == -1 else chunk)


def how(admitted: Admitted | None) -> tuple[str, int, int | None] | None:
    return admitted and (admitted.how, admitted.demand, admitted.chunk_tokens)
