"""Slots come from the allocator of virtual pages, which is born with its pager, for models that LSA can page."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def build_allocator(original, self, *, sizes, token_to_kv_pool, **options):
    """Look at model and pool as they are, then build.

    Raises:
        SystemExit: LSA cannot work with them. An exception would reach the user inside a traceback of this process,
            and end the one that serves with the status of a process that was killed.
    """
    from sglang_lsa.config import PAGE_SIZE
    from sglang_lsa.memory.pager import Pager
    from sglang_lsa.patches.arguments import tp_size_of
    from sglang_lsa.patches.compatibility import Unsupported
    from sglang_lsa.patches.layouts import layout_of
    from sglang_lsa.patches.model_guard import kv_scales, problems
    from sglang_lsa.patches.ranks import ranks
    from sglang_lsa.patches.resolved import resolved
    from sglang_lsa.radix_ext.allocator import VirtualPageAllocator
    from sglang_lsa.radix_ext.swa_allocator import LsaSwaAllocator

    pool, args = token_to_kv_pool, resolved(self.server_args)
    if found := problems(
        self.model,
        pool,
        name=self.model_config.model_path,
        q_heads=self.model_config.num_attention_heads // tp_size_of(self),
        window=self.sliding_window_size,
        model_dtype=self.model_dtype,
        record=args.lsa_config.record is not None,
        kv_dtype_asked=args.kv_cache_dtype,
        attention=args.get_attention_backends(),
    ):
        raise SystemExit(f"sglang-lsa: {Unsupported(found)}")
    layout = layout_of(pool, PAGE_SIZE, self.model_dtype, kv_scales(self.model, self.device))
    pager = Pager(layout, sizes.max_total_num_tokens // layout.page_tokens, ranks=ranks(tp_size_of(self)))
    page, size = layout.page_tokens, pager.ledger.virtual_pages * layout.page_tokens
    if layout.page_tables:  # slots of a sliding window beside those of pages
        window = sizes.swa_max_total_num_tokens
        return LsaSwaAllocator(size, window, page, self.kv_cache_dtype, self.device, pool, pager)
    return VirtualPageAllocator(size, page, self.kv_cache_dtype, self.device, pool, pager)


HOOK = Hook(
    target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool_allocator",
    kind="around",
    function=build_allocator,
    parameters=("self", "sizes", "token_to_kv_pool"),
    why="The ledger must know every page that is handed out and taken back.",
    until="SGLang has a registry of allocators.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
    relies_on=(
        "sglang.srt.mem_cache.kv_cache_configurator._PoolSizes",
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._init_pools",
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.__init__",
    ),
)
