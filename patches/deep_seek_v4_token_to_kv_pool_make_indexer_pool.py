"""Index keys are as many as the entries of device pages, not as those of all slots."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def make_indexer_pool(original, self, size, *args, **options):
    return original(self, self.c4_size, *args, **options)


HOOK = Hook(
    target="sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool._make_indexer_pool",
    kind="around",
    function=make_indexer_pool,
    parameters=("self", "size"),
    why="SGLang derives their number from the layers that keep an entry for 128 tokens, which have virtual size.",
    until="SGLang has a size of its own for index keys.",
    test="tests/unit/test_dsv4.py::test_a_pool_of_sglangs_own_has_the_planned_rows",
    relies_on=(
        "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool.__init__",
        "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4IndexerPool._create_buffer",
        "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4SingleKVPool.create_buffer",
    ),
)
