"""New KV is written to physical slots: translated once, for every writer."""

from __future__ import annotations

from sglang_lsa.kernels.page_table import physical_slots
from sglang_lsa.patches.hook import Hook


def translate_out_cache_loc(result, cls, batch, model_runner, **options):
    pager = model_runner.lsa.pager
    if result.out_cache_loc is not None and not pager.layout.page_tables:
        result.out_cache_loc = physical_slots(result.out_cache_loc, pager.v2p, pager.page)
    return result


HOOK = Hook(
    target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
    kind="after",
    function=translate_out_cache_loc,
    parameters=("batch", "model_runner"),
    why="Slots are virtual everywhere else; some models write KV past the pool's set_kv_buffer.",
    until="SGLang's pools translate slots themselves.",
    test="tests/server/test_exactness.py::test_full_budget_equals_stock",
)
