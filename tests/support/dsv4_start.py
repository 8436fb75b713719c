"""As far as a DeepSeek-V4 server comes without a GPU: arguments, sizes, SGLang's own pools, and the runtime over them.

    python tests/support/dsv4_start.py FOLDER

Prints JSON. A process of its own, since SGLang's hooks and its arguments are there once for a process.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from dsv4_model import LAUNCH

GB = 1 << 30
GPU, HOST = 141 * GB, 64 * GB
LSA = ("--lsa-host-memory-gb=0.02", "--lsa-device-tokens=16384")
FLAGS: dict[str, Sequence[str]] = {
    "tiny": LSA,
    "policy": (*LSA, "--lsa-policy=random"),
    "quest": (*LSA, "--lsa-policy=quest"),
    "indices": (*LSA, "--enable-return-indexer-topk"),
    "full": (*LSA, "--lsa-policy=full"),
    "other page": (*LSA, "--page-size=64"),
    "other attention": (*LSA, "--decode-attention-backend=fa3"),
    "not here yet": (*LSA, "--prefill-attention-backend=fa3"),
    "bfloat16": (*LSA, "--kv-cache-dtype=bfloat16"),
    "hisparse": (*LSA, "--enable-hisparse"),
    "hicache": (*LSA, "--enable-hierarchical-cache"),
    "fp4 indexer": (*LSA, "--enable-deepseek-v4-fp4-indexer"),
    "tp": (*LSA, "--tp-size=2"),
    "mixed": (*LSA, "--enable-mixed-chunk"),
    "resident": (*LSA, "--lsa-prefill=resident"),
    "groups": (*LSA, '--lsa-config={"groups": true}'),
    "groups auto": (*LSA, '--lsa-config={"groups": "auto", "group_margin": 0.1}'),
    "no index there": (*LSA, "--lsa-observe-layers=2"),
    "layers": (*LSA, "--lsa-observe-layers=1,5"),
    "recorded": (*LSA, "--lsa-record=/nowhere/at/all"),
}


def resolved(flags: Sequence[str], folder: str) -> Any:
    from sglang_lsa.doctor.server import Assumed, resolve

    return resolve(["--model-path", folder, *LAUNCH, *flags], Assumed(GPU, HOST))


def told(flags: Sequence[str], folder: str) -> dict[str, Any]:
    """What the server makes of these flags: some of its arguments, or its problems."""
    from sglang_lsa.patches.compatibility import Unsupported

    try:
        server_args = resolved(flags, folder)
    except Unsupported as error:
        return {"problems": error.problems}
    except Exception as error:  # SGLang's own refusal
        return {"sglang": str(error)}
    names = ("page_size", "attention_backend", "prefill_attention_backend", "kv_cache_dtype", "radix_cache_backend")
    config = server_args.lsa_config
    seen = {name: getattr(server_args, name) for name in names}
    return seen | {"policy": config.policy, "groups": config.groups, "group_margin": config.group_margin}


def built(folder: str) -> dict[str, Any]:
    """SGLang's own pools on the CPU, as the hooks size them, and the allocator and runtime that the hooks make."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
    from sglang.srt.model_executor.pool_configurator import DSV4PoolConfigurator
    from sglang.srt.runtime_context import get_parallel, publish

    from sglang_lsa.patches.kv_cache_configurator_build_allocator import build_allocator
    from sglang_lsa.patches.kv_cache_configurator_config_from_budget import config_from_budget
    from sglang_lsa.patches.model_runner_init_post_memory_pool_components import create_runtime
    from sglang_lsa.serve.status import status

    server_args = resolved(LSA, folder)
    publish(server_args, role="scheduler")
    model = server_args.get_model_config()
    itself = SimpleNamespace(
        server_args=server_args,
        model_config=model,
        model=torch.nn.ModuleList(RadixAttention(64, 512, 512**-0.5, 1, layer) for layer in range(6)),
        model_dtype=torch.bfloat16,
        kv_cache_dtype=torch.float8_e4m3fn,
        kv_cache_dtype_str="fp8_e4m3",
        layer_info=SimpleNamespace(start_layer=0, end_layer=6, num_effective_layers=6),
        ps=SimpleNamespace(pp_size=1, attn_dp_size=1, tp_size=1),
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
        sliding_window_size=128,
        is_hybrid_swa=True,
        device="cuda",
    )
    configurator = DSV4PoolConfigurator(itself)
    stock = configurator.calculate_pool_sizes(GB // 4, 256)
    with get_parallel().override(attn_tp_size=1):
        sizes = config_from_budget(lambda *_, **__: configurator.calculate_pool_sizes(GB // 4, 256), itself, GB // 4)
    sizes.max_running_requests = 8
    sizes = configurator.finalize_with_max_running_requests(sizes)
    pool = DeepSeekV4TokenToKVPool(
        max_num_reqs=8,
        num_req_slots=9,
        swa_size=sizes.swa_max_total_num_tokens,
        c4_size=sizes.c4_max_total_num_tokens,
        c128_size=sizes.c128_max_total_num_tokens,
        c4_state_pool_size=sizes.c4_state_pool_size,
        c128_state_pool_size=sizes.c128_state_pool_size,
        page_size=256,
        swa_page_size=256,
        sliding_window=128,
        dtype=torch.float8_e4m3fn,
        c4_state_dtype=torch.float32,
        c128_state_dtype=torch.float32,
        qk_nope_head_dim=448,
        qk_rope_head_dim=64,
        indexer_head_dim=128,
        layer_num=6,
        device="cpu",
        enable_memory_saver=False,
        compression_ratios=model.compress_ratios,
        start_layer=0,
        end_layer=6,
    )
    # What was decided for a GPU is built here.
    itself.device = "cpu"
    object.__setattr__(server_args, "device", "cpu")
    allocator = build_allocator(None, itself, sizes=sizes, token_to_kv_pool=pool)
    table = SimpleNamespace(req_to_token=torch.zeros((9, model.context_len + 4), dtype=torch.int32))
    itself.token_to_kv_pool_allocator, itself.req_to_token_pool = allocator, table
    create_runtime(None, itself)
    layout, index = allocator.pager.layout, itself.lsa.index
    window = ("swa_max_total_num_tokens", "c4_state_pool_size")
    return {
        "physical": server_args.lsa_plan.physical_tokens // 256,
        "virtual": server_args.lsa_plan.virtual_tokens // 256,
        "slots": [allocator.full_available_size(), allocator.swa_available_size()],
        "planned": dict(server_args.lsa_plan.overhead),
        "status": status(itself.lsa),
        "rows": {
            "entries": [list(buffer.shape) for buffer in pool.c4_kv_pool.kv_buffer],
            "index": [list(buffer.shape) for buffer in pool.c4_indexer_kv_pool.index_k_with_scale_buffer],
            "c128": [list(buffer.shape) for buffer in pool.c128_kv_pool.kv_buffer],
        },
        "layers": list(layout.by_layer),
        "page_bytes": layout.page_bytes,
        "window is stock": all(getattr(stock, name) == getattr(sizes, name) for name in window),
        "window": sizes.swa_max_total_num_tokens,
        "same memory": layout.kv_buffers[1].data_ptr() == pool.c4_kv_pool.kv_buffer[0].data_ptr(),
        "index heads": [index.heads, index.head_dim, index.hidden],
        "policies": list(itself.lsa.policies),
    }


def main(folder: str) -> None:
    logging.disable(logging.WARNING)
    answers = {name: told(flags, folder) for name, flags in FLAGS.items()}
    print(json.dumps({"flags": answers, "built": built(folder)}))


if __name__ == "__main__":
    main(sys.argv[1])
