"""Whoever asks how full the server is learns of the device pool too: routers, ``/v1/loads``, metrics and the log."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.metrics import device_share


def count_device_pages(result, self):
    """The larger share is reported, in tokens of SGLang's own total; what is available and evictable stays as it is,
    since SGLang's check for leaks adds those up."""
    share = device_share(self.token_to_kv_pool_allocator.pager)
    if share > result.full_token_usage:
        result.full_token_usage = share
        result.full_num_used = round(share * self.max_total_num_tokens)


HOOK = Hook(
    target="sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver.get_pool_stats",
    kind="after",
    function=count_device_pages,
    parameters=("self",),
    why="SGLang counts tokens of the host mirror, of which there are more: a full device pool would seem almost empty.",
    until="SGLang asks its allocator how full it is.",
    test="tests/server/test_monitoring.py::test_a_full_device_pool_is_load",
    relies_on=("sglang.srt.managers.scheduler_components.pool_stats_observer.PoolStats",),
)
