"""Warm-up: Triton compiles a kernel when it is first called, which no request should wait for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sglang_lsa.engine.native_index import IndexKeys, IndexObserver
from sglang_lsa.engine.observe import PageKeys, QueryObserver
from sglang_lsa.engine.policies import Policy
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.kernels.bound_score import MANY_PAGES
from sglang_lsa.kernels.merge_states import merge_states
from sglang_lsa.kernels.page_table import decode_indices, decode_pages, lanes_for, physical_slots
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.memory.scores import Reduction
from sglang_lsa.memory.staging import Staging


def compile_kernels(
    pager: Pager,
    table: ResidentTable,
    observer: QueryObserver | IndexObserver,
    page_keys: PageKeys | IndexKeys,
    policies: Mapping[str, Policy],
    staging: Staging | None,
    req_to_token: torch.Tensor,
) -> None:
    """Run every kernel once, on padding pages and rows, so that no request waits for the compiler.

    Kernels of attention over tables of physical pages are the backend's own.
    """
    if pager.ranks.size > 1:  # its communicator is made at its first use, and takes memory
        pager.ranks.scores.reduce(torch.zeros(2, device=pager.device), Reduction.SUM)
    padding = np.zeros(1, dtype=np.int64)
    page_keys.complete(padding, padding)
    for name, policy in policies.items():
        policy.complete(padding, padding)
        request = Request("", 0, Asked(name, 1.0), tokens=observer.positions)
        for pages in (1, MANY_PAGES + 1):
            policy.score(request, np.zeros(pages, dtype=np.int64))
        policy.score_all([request] * 2, [padding] * 2)
    if isinstance(observer, QueryObserver) and staging is not None:
        _attention(pager, table, observer, staging, req_to_token)
    pager.transfer.store(padding, padding, lambda: None)
    pager.transfer.wait()
    for layer_by_layer in (False, True):
        pager.transfer.recall(padding, padding, lambda: None, layer_by_layer)
    pager.transfer.wait()
    pager.transfer.recalled_pages, pager.transfer.recall_seconds = 0, 0.0


def _attention(
    pager: Pager, table: ResidentTable, observer: QueryObserver, staging: Staging, req_to_token: torch.Tensor
) -> None:
    """Kernels that observe queries, say which slots are read, and merge what streamed blocks give."""
    padding, rows = np.zeros(1, dtype=np.int64), torch.zeros(1, dtype=torch.int64, device=pager.device)
    queries = observer.buffer[0, :, 0].clone()
    for layer in observer.slot_of_layer:
        observer.observe(layer, queries[:1], rows, rows)
    physical_slots(rows, pager.v2p, pager.page)
    for batch in sorted({lanes_for(requests) for requests in range(1, table.rows)}):
        many, indices = (torch.zeros(batch, dtype=kind, device=rows.device) for kind in (torch.int64, torch.int32))
        indptr = torch.zeros(batch + 1, dtype=torch.int32, device=rows.device)
        tables = table.table, req_to_token, pager.v2p
        for lengths in (many, many.int()):  # of requests in decode, of their prefixes in prefill
            decode_indices(*tables, many, lengths, pager.page, indptr, indices)
    for lengths in (rows, rows.int()):
        pages, read = (torch.zeros(shape, dtype=torch.int32, device=rows.device) for shape in ((1, 1), (1,)))
        decode_pages(table.table, req_to_token, pager.v2p, rows, lengths, pager.page, pages, read)
    for keys, _ in staging.read(padding).layer(0):
        states = torch.zeros((1, *queries.shape[1:]), device=keys.device)
        merge_states(states, states[..., 0].contiguous(), queries[:1], states[..., 0].contiguous())
    staging.staged_pages = 0
