"""Integrity: do the ledger, SGLang's table, the requests and the resident table say the same?"""

from __future__ import annotations

import hashlib
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


def compare(pager: Pager, requests: Mapping[str, Request]) -> None:
    """See whether all ranks have the same records.

    Raises:
        RanksDisagree: they have not; both are in its message.
    """
    if pager.ranks.size > 1:
        pager.ranks.compare(digest(pager, requests), lambda: described(pager, requests))


def digest(pager: Pager, requests: Mapping[str, Request]) -> int:
    """A hash of where pages are, who holds them, and what each request reads; below 2 ** 63."""
    found = hashlib.blake2b(pager.ledger.v2p.tobytes(), digest_size=8)
    for holder in pager.ledger.holders():
        found.update(f"{holder} {sorted(pager.ledger.held_by(holder))}".encode())
    for key in sorted(requests):
        resident = requests[key].resident
        found.update(f"{key} {requests[key].tokens} {resident.tail_start} {resident.positions.tolist()}".encode())
    return int.from_bytes(found.digest(), "little") >> 1


def described(pager: Pager, requests: Mapping[str, Request]) -> str:
    """The same in words, as far as a log has room for it."""
    ledger = pager.ledger
    lines = [
        f"pass {ledger.passes}, {ledger.held_pages} pages held, {ledger.device_pages} on the device, "
        f"{ledger.host_pages} mirrored, {ledger.obtainable_pages} to be had, {ledger.recalls} recalled, "
        f"{ledger.evictions} evicted; v2p {hashlib.blake2b(ledger.v2p.tobytes(), digest_size=8).hexdigest()}"
    ]
    lines += [f"{holder} holds {sorted(ledger.held_by(holder))}" for holder in ledger.holders()]
    for key, request in requests.items():
        resident = request.resident
        lines.append(
            f"{key} has {request.tokens} tokens, window {request.window}, {request.steps_left} steps left, reads "
            f"{resident.positions.tolist()} and from page {resident.tail_start} on"
        )
    return "\n  ".join(lines)


def _check_table(pager: Pager, table: ResidentTable, request: Request) -> None:
    count = len(request.resident.positions)
    row = table.table[request.row, : PAGES + count].cpu().numpy()
    physical = pager.ledger.v2p[request.pages[request.resident.positions]]
    shortening = (request.resident.tail_start - count) * pager.page
    expected = (count, request.resident.tail_start, *physical.tolist())
    if tuple(row.tolist()) != expected or table.shortening[request.row] != shortening:
        raise RuntimeError(f"LSA: the resident table has another set for {request.rid} than it reads")
