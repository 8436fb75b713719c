"""The device pool has physical size."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def build_mha_kv_pool(original, self, *, max_total_num_tokens, **options):
    return original(self, max_total_num_tokens=self.server_args.lsa_plan.physical_tokens, **options)


HOOK = Hook(
    target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
    kind="around",
    function=build_mha_kv_pool,
    parameters=("self", "max_total_num_tokens"),
    why="Otherwise the pool would be as large as the host mirror.",
    until="SGLang has separate sizes for slots and for device memory.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
)
