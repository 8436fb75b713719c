"""SGLang's scheduler sees as many tokens as the host mirror holds; the device pool stays at what was budgeted."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.sizing import Needs, plan_memory, selector_needs


def config_from_budget(original, self, budget_bytes, *, cap_tokens=None):
    pool_config = original(self, budget_bytes, cap_tokens=cap_tokens)
    plan = plan_memory(
        self.server_args.lsa_config,
        token_bytes=token_bytes(self),
        budgeted_tokens=pool_config.max_total_num_tokens,
        context_tokens=self.model_config.context_len,
        device=self.device,
        needs=needs(self) if self.device == "cuda" else None,
    )
    object.__setattr__(self.server_args, "lsa_plan", plan)  # this class has slots; resolved arguments are read-only
    pool_config.max_total_num_tokens = plan.virtual_tokens
    return pool_config


def needs(configurator) -> Needs:
    """What LSA's own buffers are made of, for this model and these arguments."""
    from sglang.srt.runtime_context import get_parallel

    args, model = configurator.server_args, configurator.model_config
    graphs = args.cuda_graph_config.decode
    return selector_needs(
        args.lsa_config,
        rows=args.max_running_requests + 1,
        chunk_tokens=chunk if (chunk := args.chunked_prefill_size or 0) > 0 else args.max_prefill_tokens,
        graph_batch=0 if graphs.backend == "disabled" else graphs.max_bs or max(graphs.bs),
        context_tokens=model.context_len,
        layers=configurator.layer_info.num_effective_layers,
        q_heads=model.num_attention_heads // get_parallel().attn_tp_size,
        kv_heads=model.get_num_kv_heads(get_parallel().attn_tp_size),
        head_dim=model.head_dim,
        itemsize=configurator.kv_cache_dtype.itemsize,
    )


def token_bytes(configurator) -> int:
    """Bytes of KV per token, all layers of this rank."""
    from sglang.srt.runtime_context import get_parallel

    model = configurator.model_config
    heads = model.get_num_kv_heads(get_parallel().attn_tp_size)
    layers = configurator.layer_info.num_effective_layers
    return heads * (model.head_dim + model.v_head_dim) * layers * configurator.kv_cache_dtype.itemsize


HOOK = Hook(
    target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget",
    kind="around",
    function=config_from_budget,
    parameters=("self", "budget_bytes", "cap_tokens"),
    why="Everything that SGLang sizes by tokens (allocator, radix tree, admission) must use virtual tokens.",
    until="SGLang has separate sizes for slots and for device memory.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
)
