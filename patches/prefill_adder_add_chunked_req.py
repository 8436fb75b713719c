"""The next chunk of a prompt is no larger than the device pages promised to it, and ends with a page."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.prefill_adder_add_one_req import limit_chunk, prefills_of
from sglang_lsa.patches.requests import key_of


def add_chunked_req(original, self, req):
    lsa = self.tree_cache.lsa
    how, page = lsa.admission.admitted[key_of(req)], lsa.pager.page
    limit_chunk(self, how)
    room = min(self.rem_chunk_tokens, int(self.rem_total_tokens)) // page * page
    if room > 0:
        self.rem_chunk_tokens = min(self.rem_chunk_tokens, room)
    prefills_of(self).append(how.how)
    return original(self, req)


HOOK = Hook(
    target="sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
    kind="around",
    function=add_chunked_req,
    parameters=("self", "req"),
    why="SGLang would compute a full chunk, and may end it within a page; the next could not read that from the host.",
    until="SGLang lets the tree cache bound chunks.",
    test="tests/server/test_streamed_prefill.py::test_prompts_four_times_the_pool_equal_stock",
    relies_on=("sglang.srt.managers.schedule_policy.PrefillAdder.rem_total_tokens",),
)
