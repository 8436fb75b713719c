"""SGLang's batches and requests in the core's terms: the one place that knows what they look like before a pass.

Imports no SGLang.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_lsa.engine.admission import key_of
from sglang_lsa.engine.step import DECODE, EXTEND, Arrival, Batch

READS: dict[str, tuple[str, ...]] = {
    "sglang.srt.managers.schedule_batch.Req": (
        "full_untruncated_fill_ids",
        "origin_input_ids",
        "output_ids",
        "req_pool_idx",
        "rid",
        "sampling_params",
    ),
    "sglang.srt.managers.schedule_batch.ScheduleBatch": (
        "chunked_req",
        "forward_mode",
        "prefix_lens",
        "reqs",
        "seq_lens_cpu",
    ),
}
"""Attributes that are read here."""


def batch_of(batch: Any) -> Batch:
    """A ``ScheduleBatch`` that is about to be computed."""
    keys, lengths = tuple(map(key_of, batch.reqs)), tuple(batch.seq_lens_cpu.tolist())
    if batch.forward_mode.is_decode():
        return Batch(DECODE, keys, lengths, tuple(tokens - 1 for tokens in lengths))
    if not batch.forward_mode.is_extend():
        return Batch()
    reqs, chunked = tuple(batch.reqs), batch.chunked_req
    middle = next((index for index, req in enumerate(reqs) if req is chunked), None)
    return Batch(EXTEND, keys, lengths, tuple(batch.prefix_lens), middle, lambda index: arrival_of(reqs[index]))


def arrival_of(req: Any) -> Arrival:
    """A ``Req`` of which nothing was computed since it was admitted."""
    ids, new_tokens = req.full_untruncated_fill_ids, getattr(req.sampling_params, "max_new_tokens", None) or 0
    return Arrival(req, req.rid, req.req_pool_idx, ids, new_tokens, lambda tokens: text_of(req, tokens))


def text_of(req: Any, tokens: int) -> np.ndarray:
    """The first ``tokens`` token ids of a request, or those of them that the scheduler knows, int64 ``[n]``."""
    prompt, generated = (np.asarray(ids, dtype=np.int64) for ids in (req.origin_input_ids, req.output_ids))
    return np.concatenate((prompt, generated))[:tokens]
