"""Pages are made resident before a forward pass; mirror and resident sets are brought up to date after it."""

from __future__ import annotations

import logging
import time
from http import HTTPStatus

import torch

from sglang_lsa.engine.failures import out_of_memory
from sglang_lsa.memory.ledger import LedgerError
from sglang_lsa.patches.batch import batch_of
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.releases import installed

logger = logging.getLogger(__name__)


def run_batch(original, self, batch, *args, **kwargs):
    lsa = self.tp_worker.model_runner.lsa
    if self.enable_overlap and self.device == "cuda":
        lsa.run_on(self.forward_stream)
    try:
        number = lsa.before_forward(batch_of(batch), self.token_to_kv_pool_allocator.take_new_pages())
        result = original(self, batch, *args, **kwargs)
        lsa.after_forward(number)
        return result
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, LedgerError) or not out_of_memory(error):
            raise
        lsa.forward_failed(error)
        return give_up(self, batch, error)


def give_up(scheduler, batch, error):
    """Fail the requests of this batch and go on; returns a result without tokens for them."""
    from sglang.srt.disaggregation.utils import prepare_abort
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.mem_cache.common import release_kv_cache

    kept_out = {"checkpoint" if installed().checkpoints else "is_insert": False}
    names = [req.rid for req in batch.reqs]
    logger.error("LSA: memory ran out in a batch of %d requests, which fail: %s (%s)", len(names), names, error)
    for req in batch.reqs:
        if req.finished() or req.is_retracted:
            continue
        prepare_abort(req, f"Memory ran out: {error}", HTTPStatus.INTERNAL_SERVER_ERROR)
        req.to_finish, req.finished_output = None, True
        release_kv_cache(req, scheduler.tree_cache, **kept_out)
        if req is scheduler.chunked_req:
            scheduler.chunked_req = None
        abort = AbortReq(finished_reason=req.finished_reason.to_json(), rid=req.rid)
        scheduler.ipc_channels.send_to_tokenizer.send_output(abort, req)
    scheduler.tp_worker.model_runner.lsa.pager.make_equal()
    batch.input_ids, batch.return_logprob, batch.return_hidden_states = None, False, False
    if batch.launch_ts is None:  # SGLang's counters ask when it was launched, and behind which pass, though nothing was
        batch.forward_iter, batch.launch_ts = scheduler.forward_ct, time.monotonic()
    return GenerationBatchResult(next_token_ids=torch.zeros(len(batch.reqs), dtype=torch.int64))


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.run_batch",
    kind="around",
    function=run_batch,
    parameters=("self", "batch"),
    why="The one place that sees every forward pass together with its requests.",
    until="SGLang calls plugins around a forward pass.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
    relies_on=(
        "sglang.srt.disaggregation.utils.prepare_abort",
        "sglang.srt.managers.io_struct.AbortReq",
        "sglang.srt.managers.utils.GenerationBatchResult",
        "sglang.srt.mem_cache.common.release_kv_cache",
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        "sglang.srt.managers.scheduler.Scheduler._record_step_counters",
        "sglang.srt.managers.schedule_batch.Req.finished",
    ),
)
