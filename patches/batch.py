"""SGLang's batches in the core's terms: the one place that knows what they look like before a pass.

Imports no SGLang.
"""

from __future__ import annotations

from typing import Any

from sglang_lsa.engine.step import DECODE, EXTEND, Batch
from sglang_lsa.patches.requests import entry_of, key_of

READS: dict[str, tuple[str, ...]] = {
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
        return Batch(DECODE, keys, lengths, tuple([tokens - 1 for tokens in lengths]))
    if not batch.forward_mode.is_extend():
        return Batch()
    reqs, chunked = tuple(batch.reqs), batch.chunked_req
    middle = next((index for index, req in enumerate(reqs) if req is chunked), None)
    return Batch(EXTEND, keys, lengths, tuple(batch.prefix_lens), middle, lambda index: entry_of(reqs[index]))
