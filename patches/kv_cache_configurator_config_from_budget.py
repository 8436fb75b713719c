"""SGLang's scheduler sees as many tokens as the host mirror holds; the device pool stays at what was budgeted."""

from __future__ import annotations

from sglang_lsa.engine.sizing import announce, plan_memory, smallest
from sglang_lsa.memory.layout.dsv4 import RATIO
from sglang_lsa.patches.architectures import is_deepseek_v4
from sglang_lsa.patches.arguments import budgeted_tokens, extra_context, kv_page, server_needs
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.ranks import ranks
from sglang_lsa.patches.releases import IncompatibleSGLang
from sglang_lsa.patches.resolved import proof_of_life, remember


def config_from_budget(original, self, budget_bytes, *, cap_tokens=None):
    from sglang.srt.runtime_context import get_parallel

    try:
        proof_of_life(self.server_args)
    except IncompatibleSGLang as error:
        raise SystemExit(f"sglang-lsa: {error}") from error
    pool_config = original(self, budget_bytes, cap_tokens=cap_tokens)
    shape = {
        "layers": self.layer_info.num_effective_layers,
        "itemsize": self.kv_cache_dtype.itemsize,
        "tp_size": get_parallel().attn_tp_size,
    }
    extra = extra_context(self.server_args)
    needs = server_needs(self.server_args, self.model_config, extra_context=extra, **shape)
    sizes = {
        "page": kv_page(self.model_config, **shape),
        "budgeted_tokens": budgeted_tokens(self.model_config, pool_config.max_total_num_tokens),
        "context_tokens": self.model_config.context_len,
        "device": self.device,
        "needs": needs,
    }
    plan = agreed_plan(self.server_args.lsa_config, ranks(shape["tp_size"]), needs, sizes)
    remember(self.server_args, "lsa_plan", plan)  # this class has slots
    pool_config.max_total_num_tokens = plan.virtual_tokens
    if is_deepseek_v4(self.model_config):
        # The sliding window and the compression states stay what SGLang made them.
        pool_config.full_max_total_num_tokens = plan.virtual_tokens
        pool_config.c128_max_total_num_tokens = plan.virtual_tokens // 128
        pool_config.c4_max_total_num_tokens = plan.physical_tokens // RATIO
    return pool_config


def agreed_plan(config, ranks, needs, sizes):
    """What all ranks have room for.

    Raises:
        ValueError: one of them has not enough, or pages of another shape than the others; all of them raise it.
    """
    try:
        own, problem = plan_memory(config, **sizes, local_ranks=ranks.local), None
    except ValueError as error:
        if ranks.size == 1:
            raise
        own, problem = None, str(error)
    if ranks.size == 1:
        return own
    seen = ranks.every((problem, own), "agree on sizes")
    for rank, (problem, _) in enumerate(seen):
        if problem is not None:
            raise ValueError(f"rank {rank}: {problem}")
    plans = [plan for _, plan in seen]
    if any(plan.page != plans[0].page for plan in plans):
        raise ValueError(f"ranks have pages of different shapes: {[plan.page for plan in plans]}")
    plan = smallest(config, plans, needs)
    if plan != own:
        announce(plan)
    return plan


HOOK = Hook(
    target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget",
    kind="around",
    function=config_from_budget,
    parameters=("self", "budget_bytes", "cap_tokens"),
    why="Everything that SGLang sizes by tokens (allocator, radix tree, admission) must use virtual tokens.",
    until="SGLang has separate sizes for slots and for device memory.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
    relies_on=(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.configure",
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._derive_pool_sizes",
        "sglang.srt.model_executor.pool_configurator.MemoryPoolConfig",
        "sglang.srt.model_executor.pool_configurator.DSV4PoolConfigurator",
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_dsv4_kv_pool",
        "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len",
        "sglang.srt.distributed.parallel_state.get_tp_group",
        "sglang.srt.runtime_context.get_parallel",
        "sglang.srt.runtime_context.ParallelContext.attn_tp_size",
    ),
)
