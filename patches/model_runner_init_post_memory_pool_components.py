"""The runtime is created once the pools exist, before attention backends and graphs."""

from __future__ import annotations

import logging

from sglang_lsa.patches.hook import Hook

logger = logging.getLogger(__name__)


def create_runtime(result, self):
    from sglang_lsa.engine import sizing_dsv4
    from sglang_lsa.engine.runtime import LSARuntime
    from sglang_lsa.indexer.checkpoint import read_checkpoint_config, shipped_for
    from sglang_lsa.patches.architectures import c128_layers, native_index
    from sglang_lsa.patches.arguments import tp_size_of
    from sglang_lsa.patches.compatibility import announce_attention
    from sglang_lsa.patches.model_guard import softmax_scale
    from sglang_lsa.patches.models import shape_of
    from sglang_lsa.patches.resolved import resolved
    from sglang_lsa.serve.metrics import Metrics

    args = resolved(self.server_args)
    if args.device == "cuda":
        announce_attention(args)
    config, view = args.lsa_config, "none" if args.lsa_config.disable_view else "/lsa"
    by = f" ({config.indexer})" if config.policy == "indexer" else ""
    said = config.policy, by, config.budget, config.min_context, view
    logger.info("LSA: policy %s%s, budget %s, for contexts from %d tokens on; live view: %s", *said)
    untrained = {"quest": "Quest chooses"}
    if config.policy == "indexer" and not read_checkpoint_config(config.indexer).trained:
        untrained["indexer"] = "heads found at start choose"
    fitting = shipped_for(shape_of(self.model_config.hf_text_config)) if config.policy in untrained else []
    if fitting:
        logger.info(
            "LSA: %s pages; an indexer trained for a model of this shape comes with the package, and is used where "
            "it is named: --lsa-indexer %s",
            untrained[config.policy],
            " or ".join(fitting),
        )
    pager, index = self.token_to_kv_pool_allocator.pager, native_index(self.model_config)
    beside, shown = None, args.enable_metrics and pager.ranks.rank == 0  # all ranks have the same to show
    if index is not None:
        beside = sizing_dsv4.beside_bytes(len(c128_layers(self.model_config)), pager.ledger.virtual_pages)
    self.lsa = LSARuntime(
        args.lsa_config,
        pager,
        self.req_to_token_pool.req_to_token,
        q_heads=self.model_config.num_attention_heads // tp_size_of(self),
        softmax_scale=softmax_scale(self.model),
        chunk_tokens=chunk if (chunk := args.chunked_prefill_size or 0) > 0 else None,
        vocabulary=self.model_config.vocab_size,
        hidden_size=self.model_config.hidden_size,
        metrics=Metrics({"model_name": args.served_model_name}) if shown else None,
        index=index,
        beside=beside,
    )


HOOK = Hook(
    target="sglang.srt.model_executor.model_runner.ModelRunner._init_post_memory_pool_components",
    kind="after",
    function=create_runtime,
    parameters=("self",),
    why="Attention backend, radix tree and scheduler hooks all find the runtime on the model runner.",
    until="SGLang calls plugins when its pools are ready.",
    test="tests/server/test_virtual_memory.py::test_more_context_than_device_memory",
    relies_on=("sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool",),
)
