"""The device pool has physical size, whichever pool SGLang builds for a model."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def build_token_to_kv_pool(original, self, *, sizes, **options):
    import msgspec

    physical = msgspec.structs.replace(sizes, max_total_num_tokens=self.server_args.lsa_plan.physical_tokens)
    return original(self, sizes=physical, **options)


HOOK = Hook(
    target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool",
    kind="around",
    function=build_token_to_kv_pool,
    parameters=("self", "sizes"),
    why="Otherwise the pool would be as large as the host mirror.",
    until="SGLang has separate sizes for slots and for device memory.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
    relies_on=(
        "sglang.srt.mem_cache.kv_cache_configurator._PoolSizes",
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._init_pools",
    ),
)
