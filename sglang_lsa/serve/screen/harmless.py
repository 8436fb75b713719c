"""Fields without a row, and why none is needed. A test compares this with the installed SGLang."""

from __future__ import annotations

TYPED = "a flag or a text that FastAPI checks and nothing computes with"
CHECKED = "SGLang checks it and answers HTTP 400"
MULTIMODAL = "read only by processors of images, video and audio; models with one are refused at start"
ANSWER = "only shapes the answer, in the process that serves HTTP"
TRANSLATED = "translated to fields of /generate, which have their own row or reason"

REQUEST: dict[str, str] = {
    "text": "a text that the tokenizer reads",
    "session_id": TYPED,
    "routing_key": TYPED,
    "image_data": MULTIMODAL,
    "video_data": MULTIMODAL,
    "audio_data": MULTIMODAL,
    "mm_hashes": MULTIMODAL,
    "use_audio_in_video": MULTIMODAL,
    "modalities": MULTIMODAL,
    "max_dynamic_patch": MULTIMODAL,
    "min_dynamic_patch": MULTIMODAL,
    "image_max_dynamic_patch": MULTIMODAL,
    "video_max_dynamic_patch": MULTIMODAL,
    "images_config": MULTIMODAL,
    "sampling_params": "each of its keys has a row",
    "return_logprob": TYPED,
    "return_sampling_mask": CHECKED,
    "return_text_in_logprobs": ANSWER,
    "return_flat_raw_top_logprobs": ANSWER,
    "return_flat_raw_top_logprobs_b64": ANSWER,
    "stream": TYPED,
    "log_metrics": TYPED,
    "return_hidden_states": CHECKED,
    "return_routed_experts": "without --enable-return-routed-experts, nothing is returned",
    "routed_experts_start_len": CHECKED,
    "return_indexer_topk": "without --enable-return-indexer-topk, nothing is returned",
    "lora_path": CHECKED,
    "custom_logit_processor": "refused unless --enable-custom-logit-processor, which lets clients run any code",
    "routed_dp_rank": CHECKED,
    "disagg_prefill_dp_rank": "read only by disaggregated servers, which are refused at start",
    "conversation_id": "read by nothing behind the HTTP process",
    "background": TYPED,
    "require_reasoning": "only switches grammars of reasoning models",
    "max_thinking_tokens": CHECKED,
    "priority": "a whole number of any size sorts",
    "no_logs": TYPED,
    "return_bytes": ANSWER,
    "return_entropy": ANSWER,
    "return_prompt_token_ids": ANSWER,
    "external_trace_header": "read only with --enable-trace",
}
"""Fields of ``GenerateReqInput``."""

PROTOCOLS: dict[str, str] = {
    "model": "compared with names, or named in the answer",
    "user": "read by nothing",
    "metadata": ANSWER,
    "store": ANSWER,
    "include": ANSWER,
    "background": TYPED,
    "service_tier": "read by nothing",
    "truncation": "read by nothing",
    "max_tool_calls": "read by nothing",
    "messages": TRANSLATED,
    "prompt": TRANSLATED,
    "input": TRANSLATED,
    "instructions": TRANSLATED,
    "previous_response_id": CHECKED,
    "tools": TRANSLATED,
    "tool_choice": TRANSLATED,
    "parallel_tool_calls": TRANSLATED,
    "reasoning": TRANSLATED,
    "reasoning_effort": TRANSLATED,
    "chat_template_kwargs": TRANSLATED,
    "continue_final_message": TRANSLATED,
    "task": TRANSLATED,
    "best_of": "read by nothing",
    "echo": ANSWER,
    "suffix": ANSWER,
    "stream_options": ANSWER,
    "separate_reasoning": ANSWER,
    "stream_reasoning": ANSWER,
    "return_cached_tokens_details": ANSWER,
    "return_token_ids": ANSWER,
    "return_meta_info": ANSWER,
    "data_parallel_rank": "another name of routed_dp_rank",
}
"""Fields of the OpenAI protocols that have no namesake in ``GenerateReqInput`` or ``SamplingParams``."""
