"""Integrity: do the ledger, SGLang's table, the requests and the resident table say the same?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sglang_lsa.engine.request import Request
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_of
from sglang_lsa.memory.resident_table import PAGES, ResidentTable


def check(pager: Pager, table: ResidentTable, requests: Mapping[str, Request], req_to_token: torch.Tensor) -> None:
    """See whether any page was lost; reads the device behind what is queued on the current stream.

    Raises:
        RuntimeError: one was (LedgerError), or a request that is gone still holds one, or a request does not read what
            it holds and what the resident table says.
    """
    pager.ledger.check()
    strangers = set(pager.ledger.holders()) - set(requests)
    if strangers:
        raise RuntimeError(f"LSA: requests {sorted(strangers)} are gone but hold pages")
    for request in requests.values():
        slots = req_to_token[request.row, : request.tokens : pager.page]
        if not np.array_equal(pages_of(slots, pager.page), request.pages):
            raise RuntimeError(f"LSA: the pages of {request.rid} are not those in SGLang's table")
        if request.story.windows and not pager.ledger.held_by(request.key).issuperset(request.read_pages()):
            raise RuntimeError(f"LSA: {request.rid} reads pages that it does not hold")
        _check_table(pager, table, request)


def _check_table(pager: Pager, table: ResidentTable, request: Request) -> None:
    count = len(request.resident.positions)
    row = table.table[request.row, : PAGES + count].cpu().numpy()
    physical = pager.ledger.v2p[request.pages[request.resident.positions]]
    shortening = (request.resident.tail_start - count) * pager.page
    expected = (count, request.resident.tail_start, *physical.tolist())
    if tuple(row.tolist()) != expected or table.shortening[request.row] != shortening:
        raise RuntimeError(f"LSA: the resident table has another set for {request.rid} than it reads")
