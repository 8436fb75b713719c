"""Attributes of SGLang's objects that hooks and checks read or set, by class; a rename would show in mid-pass only.

What is read of a batch and of its requests for the core is listed beside the code that reads it, and joined here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sglang_lsa.patches import architectures, batch, requests
from sglang_lsa.patches.compatibility import REFUSED_FLAGS

HOOKS: dict[str, tuple[str, ...]] = {
    "sglang.srt.configs.model_config.ModelConfig": (
        "attention_arch",
        "attention_chunk_size",
        "compress_ratios",
        "context_len",
        "dtype",
        "head_dim",
        "hf_config",
        "hf_text_config",
        "hidden_size",
        "index_head_dim",
        "is_generation",
        "is_hybrid_swa",
        "is_multimodal",
        "model_path",
        "num_attention_heads",
        "num_attention_layers",
        "num_hidden_layers",
        "qk_rope_head_dim",
        "quantization",
        "sliding_window_size",
        "v_head_dim",
        "vocab_size",
        "window_size",
    ),
    "sglang.srt.layers.logits_processor.LogitsProcessorOutput": ("input_token_logprobs",),
    "sglang.srt.managers.schedule_batch.Req": (
        "customized_info",  # of ``evaluation/forced.py``
        "finished_output",
        "finished_reason",
        "inflight_middle_chunks",
        "is_retracted",
        "logprob_start_len",
        "origin_input_ids",
        "priority",
        "rid",
        "routed_experts_start_len",
        "time_stats",
        "to_finish",
    ),
    "sglang.srt.managers.schedule_batch.ScheduleBatch": (
        "extend_num_tokens",
        "forward_iter",
        "input_ids",
        "is_prefill_only",
        "launch_ts",
        "reqs",
        "return_hidden_states",
        "return_logprob",
        "tree_cache",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder": (
        "can_run_list",
        "preempt_list",
        "priority_scheduling_preemption_threshold",
        "rem_chunk_tokens",
        "rem_total_tokens",
        "running_batch",
        "tree_cache",
    ),
    "sglang.srt.managers.scheduler.Scheduler": (
        "_engine_paused",
        "_request_dispatcher",
        "chunked_req",
        "device",
        "enable_overlap",
        "enable_priority_preemption",
        "forward_ct",
        "forward_stream",
        "grammar_manager",
        "ipc_channels",
        "is_hybrid_swa",
        "last_batch",
        "result_queue",
        "running_batch",
        "server_args",
        "token_to_kv_pool_allocator",
        "tp_worker",
        "tree_cache",
        "waiting_queue",
    ),
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor": (
        "logprob_result_processor",
    ),
    "sglang.srt.managers.scheduler_components.pool_stats_observer.PoolStats": ("full_num_used", "full_token_usage"),
    "sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver": (
        "max_total_num_tokens",
        "token_to_kv_pool_allocator",
    ),
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager": ("tp_worker",),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager": (
        "_dispatch_to_scheduler",
        "_result_dispatcher",
        "enable_lora",
        "logical_rid_to_child_rids",
        "model_config",
        "rid_to_state",
        "server_args",
    ),
    "sglang.srt.managers.utils.GenerationBatchResult": (
        "copy_done",
        "extend_input_len_per_req",
        "extend_logprob_start_len_per_req",
        "logits_output",
        "next_token_ids",
    ),
    "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool": (
        "c4_indexer_kv_pool",
        "c4_kv_pool",
        "c4_size",
        "compression_ratios",
        "unified_kv_pool",
    ),
    "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4SingleKVPool": ("kv_buffer",),
    "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4IndexerPool": ("index_k_with_scale_buffer",),
    "sglang.srt.model_executor.pool_configurator.MemoryPoolConfig": (
        "c128_max_total_num_tokens",
        "c4_max_total_num_tokens",
        "full_max_total_num_tokens",
        "max_total_num_tokens",
    ),
    "sglang.srt.mem_cache.radix_cache.TreeNode": ("children", "id", "lock_ref"),  # the view's
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator": (
        "device",
        "kv_cache_dtype",
        "layer_info",
        "model",
        "model_config",
        "model_dtype",
        "ps",
        "server_args",
        "sliding_window_size",
    ),
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": ("forward_mode", "out_cache_loc"),
    "sglang.srt.layers.radix_attention.RadixAttention": (
        "head_dim",
        "layer_id",
        "qk_head_dim",
        "scaling",
        "tp_k_head_num",
        "tp_q_head_num",
        "tp_v_head_num",
        "v_head_dim",
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner": (
        "device",
        "is_draft_worker",
        "model",
        "model_config",
        "ps",
        "req_to_token_pool",
        "server_args",
        "token_to_kv_pool_allocator",
    ),
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner": ("model_runner",),
    # A flag that is no longer called so would be served instead of refused.
    "sglang.srt.server_args.ServerArgs": (
        *(name for name, _, _ in (*REFUSED_FLAGS, *architectures.REFUSED_FLAGS)),
        "allow_auto_truncate",
        "attention_backend",
        "chunked_prefill_size",
        "cuda_graph_config",
        "decode_attention_backend",
        "device",
        "enable_metrics",
        "kv_cache_dtype",
        "max_running_requests",
        "model_path",
        "prefill_attention_backend",
        "quantization_param_path",
        "revision",
        "sampling_backend",
        "served_model_name",
        "sleep_on_idle",
        "tokenizer_path",
        "tokenizer_worker_num",
        "tp_size",
        "trust_remote_code",
    ),
}


def together(*lists: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Several such lists in one, each attribute once."""
    found: dict[str, dict[str, None]] = {}
    for reads in lists:
        for symbol, names in reads.items():
            found.setdefault(symbol, {}).update(dict.fromkeys(names))
    return {symbol: tuple(names) for symbol, names in found.items()}


READS = together(HOOKS, batch.READS, requests.READS)
"""All that is read."""
