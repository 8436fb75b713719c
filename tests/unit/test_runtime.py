"""LSARuntime: what it plans on the host is what the device reads. Servers test the rest of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.kernels.page_table import decode_indices_reference
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.runtime import LSARuntime

ROWS, CONTEXT = 9, 20 * PAGE_SIZE


def make_runtime(**options: object) -> LSARuntime:
    keys, values = ([torch.zeros(41 * PAGE_SIZE, 1, 2)] for _ in range(2))
    req_to_token = torch.zeros((ROWS, CONTEXT), dtype=torch.int32)
    config = LSAConfig.from_mapping(options)
    return LSARuntime(config, Pager(keys, values, 64, PAGE_SIZE), req_to_token, 2, 1.0, torch.nn.Module())


def lengths_read(runtime: LSARuntime, rows: torch.Tensor, seq_lens: torch.Tensor) -> list[int]:
    """Where requests start in what the device reads."""
    indptr = torch.full((len(rows) + 1,), -1, dtype=torch.int32)
    indices = torch.empty(int(seq_lens.sum()) + 1, dtype=torch.int32)
    table, v2p = runtime.table.table, runtime.pager.v2p
    decode_indices_reference(table, runtime.req_to_token, v2p, rows, seq_lens, PAGE_SIZE, indptr, indices)
    return indptr.tolist()


@pytest.mark.parametrize("padding", [0, 3], ids=["no padding", "padding"])
def test_the_host_plans_what_the_device_reads(padding: int) -> None:
    runtime = make_runtime()
    rng = np.random.default_rng(padding)
    for _ in range(20):
        rows = 1 + rng.permutation(ROWS - 1)[: int(rng.integers(1, ROWS))]
        seq_lens = rng.integers(1, CONTEXT, len(rows))
        for row, length in zip(rows.tolist(), seq_lens.tolist(), strict=True):
            tail = int(rng.integers(0, length // PAGE_SIZE + 1))
            runtime.table.remap(row, rng.integers(1, 41, min(tail, int(rng.integers(0, 20)))), tail)
        runtime.rows = rows
        padded = torch.from_numpy(np.append(seq_lens, np.ones(padding, dtype=np.int64)))
        planned = runtime.decode_indptr(padded)
        assert planned.dtype == torch.int32
        all_rows = torch.from_numpy(np.append(rows, np.zeros(padding, dtype=np.int64)))
        assert planned.tolist() == lengths_read(runtime, all_rows, padded)
        assert padded[: len(rows)].tolist() == seq_lens.tolist(), "what SGLang passed was changed"


def test_without_a_batch_every_row_is_padding() -> None:
    """As when CUDA graphs are captured."""
    runtime = make_runtime()
    runtime.table.remap(1, np.array([3]), 5)
    assert runtime.decode_indptr(torch.ones(4, dtype=torch.int32)).tolist() == [0, 1, 2, 3, 4]
    assert runtime.decode_indptr(torch.ones(0, dtype=torch.int32)).tolist() == [0]


def test_prefill_reads_everything() -> None:
    runtime = make_runtime()
    runtime.table.remap(2, np.array([3]), 5)
    assert runtime.everything.dtype == runtime.table.table.dtype
    indptr, indices = torch.zeros(2, dtype=torch.int32), torch.zeros(CONTEXT, dtype=torch.int32)
    decode_indices_reference(
        runtime.everything,
        runtime.req_to_token,
        runtime.pager.v2p,
        torch.tensor([2]),
        torch.tensor([400]),
        PAGE_SIZE,
        indptr,
        indices,
    )
    assert indptr.tolist() == [0, 400]


def test_on_a_cpu_a_refresh_is_done_at_once() -> None:
    runtime = make_runtime(prefetch_steps=7)
    assert (runtime.lookahead.lead, runtime.lookahead.lag) == (0, 0)


def test_graph_buffers_are_as_large_as_planned() -> None:
    runtime = make_runtime(min_context=256)
    assert runtime.graph_tokens == 0
    tokens = runtime.reserve_graph_tokens(4)
    assert tokens == runtime.graph_tokens > 40 * PAGE_SIZE
