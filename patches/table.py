"""All hooks, and their installation: all or nothing."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence

from sglang_lsa.patches import (
    anthropic_serving_handle_messages,
    base_kv_cache_method_process_weights_after_loading,
    decode_cuda_graph_runner_can_run_graph,
    decode_cuda_graph_runner_capture_one_shape,
    decode_cuda_graph_runner_resolve_lora_variant,
    deep_seek_v4_token_to_kv_pool_make_indexer_pool,
    embedding_req_input_normalize_batch_and_arguments,
    engine_server_args_class,
    forward_batch_init_new,
    generate_req_input_normalize_batch_and_arguments,
    kv_cache_configurator_build_allocator,
    kv_cache_configurator_build_token_to_kv_pool,
    kv_cache_configurator_config_from_budget,
    logprob_processor_get_token_ids_logprobs_raw,
    model_runner_forward,
    model_runner_init_post_memory_pool_components,
    model_runner_load_model,
    ollama_serving_handle_chat,
    ollama_serving_handle_generate,
    open_ai_serving_chat_convert_to_internal_request,
    open_ai_serving_completion_convert_to_internal_request,
    open_ai_serving_responses_create_responses,
    open_ai_serving_responses_make_request,
    prefill_adder_add_chunked_req,
    prefill_adder_add_one_req,
    schedule_batch_check_decode_mem,
    scheduler_abort_request,
    scheduler_add_request_to_queue,
    scheduler_batch_result_processor_process_batch_result_prefill,
    scheduler_get_internal_state,
    scheduler_get_new_batch_prefill_raw,
    scheduler_handle_generate_request,
    scheduler_init_request_dispatcher,
    scheduler_on_idle,
    scheduler_output_streamer_stream_output,
    scheduler_pool_stats_observer_get_pool_stats,
    scheduler_process_input_requests,
    scheduler_run_batch,
    scheduler_weight_updater_manager_flush_cache,
    server_args_add_cli_args,
    server_args_from_cli_args,
    server_args_resolve_once,
    tokenizer_control_mixin_init_communicators,
    tokenizer_manager_create_abort_task,
    tokenizer_manager_create_tokenized_object,
    tokenizer_manager_init_req_state,
    tokenizer_manager_validate_one_request,
    uvicorn_run,
)
from sglang_lsa.patches.bindings import replaced_at_the_end
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.reads import READS
from sglang_lsa.patches.releases import RELEASES, IncompatibleSGLang, Release, check_version
from sglang_lsa.patches.relied import BEYOND_HOOKS, check_source, symbols_of

INTAKE: tuple[Hook, ...] = (
    server_args_add_cli_args.HOOK,
    server_args_from_cli_args.HOOK,
    server_args_resolve_once.HOOK,
    engine_server_args_class.HOOK,
)
"""What lets a configuration in; changes nothing for a server that has none."""

SERVING: tuple[Hook, ...] = (
    kv_cache_configurator_config_from_budget.HOOK,
    model_runner_load_model.HOOK,
    kv_cache_configurator_build_token_to_kv_pool.HOOK,
    deep_seek_v4_token_to_kv_pool_make_indexer_pool.HOOK,
    kv_cache_configurator_build_allocator.HOOK,
    base_kv_cache_method_process_weights_after_loading.HOOK,
    model_runner_init_post_memory_pool_components.HOOK,
    forward_batch_init_new.HOOK,
    decode_cuda_graph_runner_can_run_graph.HOOK,
    decode_cuda_graph_runner_capture_one_shape.HOOK,
    decode_cuda_graph_runner_resolve_lora_variant.HOOK,
    scheduler_run_batch.HOOK,
    scheduler_add_request_to_queue.HOOK,
    scheduler_get_new_batch_prefill_raw.HOOK,
    scheduler_weight_updater_manager_flush_cache.HOOK,
    scheduler_get_internal_state.HOOK,
    scheduler_init_request_dispatcher.HOOK,
    scheduler_on_idle.HOOK,
    scheduler_pool_stats_observer_get_pool_stats.HOOK,
    prefill_adder_add_one_req.HOOK,
    prefill_adder_add_chunked_req.HOOK,
    model_runner_forward.HOOK,
    schedule_batch_check_decode_mem.HOOK,
    uvicorn_run.HOOK,
    tokenizer_manager_validate_one_request.HOOK,
    tokenizer_control_mixin_init_communicators.HOOK,
    logprob_processor_get_token_ids_logprobs_raw.HOOK,
    generate_req_input_normalize_batch_and_arguments.HOOK,
    embedding_req_input_normalize_batch_and_arguments.HOOK,
    open_ai_serving_chat_convert_to_internal_request.HOOK,
    open_ai_serving_completion_convert_to_internal_request.HOOK,
    open_ai_serving_responses_create_responses.HOOK,
    open_ai_serving_responses_make_request.HOOK,
    anthropic_serving_handle_messages.HOOK,
    ollama_serving_handle_chat.HOOK,
    ollama_serving_handle_generate.HOOK,
    tokenizer_manager_init_req_state.HOOK,
    tokenizer_manager_create_tokenized_object.HOOK,
    tokenizer_manager_create_abort_task.HOOK,
    scheduler_abort_request.HOOK,
    scheduler_handle_generate_request.HOOK,
    scheduler_batch_result_processor_process_batch_result_prefill.HOOK,
    scheduler_output_streamer_stream_output.HOOK,
    scheduler_process_input_requests.HOOK,
)


_wrapped: set[str] = set()


def used(hooks: Sequence[Hook], release: Release) -> list[Hook]:
    """Those that are wanted in this release, and that SGLang does not do without here."""
    return [hook for hook in hooks if release.has(hook.target) and not hook.needless]


def _wrap(hook: Hook) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if hook.kind == "attribute":
        owner, _, name = hook.target.rpartition(".")
        place = pkgutil.resolve_name(owner)
        setattr(place, name, hook.function(getattr(place, name)))
    else:
        HookRegistry._apply_target(hook.target, [(HookType(hook.kind), hook.function, None)])


def install(hooks: Sequence[Hook]) -> None:
    """Check every target, then wrap them all. Hooks that are in place already are skipped, and so are those of parts
    that SGLang itself does without here.

    Each is wrapped around whatever is there, by the function that SGLang's own ``apply_hooks`` uses. That one wraps a
    target only once, so that of two plugins with a hook on the same target the second would be lost; and it only logs
    what goes wrong.

    Raises:
        IncompatibleSGLang: SGLang is another version, a target or what else we rely on changed, or a target could not
            be wrapped. In all but the last case nothing was wrapped.
    """
    import sglang

    check_version(sglang.__version__)
    missing = [hook for hook in used(hooks, RELEASES[sglang.__version__]) if hook.target not in _wrapped]
    if not missing:
        return
    for hook in missing:
        hook.check()
    serves = any(hook not in INTAKE for hook in missing)
    symbols = [*symbols_of(missing), *(BEYOND_HOOKS if serves else ())]
    check_source(sglang.__version__, symbols, READS if serves else {})
    with replaced_at_the_end():
        for hook in missing:
            try:
                _wrap(hook)
            except Exception as error:
                raise IncompatibleSGLang(
                    f"could not wrap {hook.target} ({error!r}): not serving rather than serving without LSA"
                ) from error
            _wrapped.add(hook.target)
