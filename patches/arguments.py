"""What SGLang makes of its resolved arguments; asked by the server's hooks, and by the doctor, which starts none.

Imports SGLang where it is asked, so that whoever imports this need not have it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine import sizing_dsv4
from sglang_lsa.engine.sizing import Needs, selector_needs
from sglang_lsa.memory.layout.base import PageShape
from sglang_lsa.memory.layout.dsv4 import dsv4_shape
from sglang_lsa.memory.layout.mha import mha_shape
from sglang_lsa.memory.mirror import GB
from sglang_lsa.patches import compatibility
from sglang_lsa.patches.architectures import c4_layers, c128_layers, native_index
from sglang_lsa.patches.releases import installed
from sglang_lsa.patches.resolved import resolved

FP8 = 1
"""Bytes of one number of KV in FP8."""


@contextmanager
def published(server_args: Any) -> Iterator[None]:
    """Inside, a process that serves nothing may ask SGLang what it answers from these arguments without being given
    them."""
    if not installed().resolves_late:
        yield
        return
    from sglang.srt.runtime_context import create_context, use_context

    with use_context(create_context(server_args, role="scheduler")):
        yield


def extra_context(server_args: Any) -> int:
    """Tokens that a row of SGLang's table has room for beyond the context of the model."""
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len

    given = () if installed().resolves_late else (server_args,)
    return get_req_to_token_extra_context_len(*given)


def tp_size_of(owner: Any) -> int:
    """Ranks that share the heads of the model of SGLang's model runner, or of what plans its pools."""
    return resolved(owner.server_args).tp_size if installed().resolves_late else owner.ps.tp_size


def kv_dtype(server_args: Any, model: Any) -> torch.dtype:
    """In what KV will be kept, as far as the arguments decide it.

    Args:
        model: SGLang's ModelConfig.
    """
    from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype

    _, dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype=server_args.kv_cache_dtype,
        model=None,
        model_dtype=model.dtype,
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend=None,
    )
    return dtype


def server_needs(
    server_args: Any, model: Any, *, layers: int, itemsize: int, extra_context: int, tp_size: int
) -> Needs:
    """What LSA's own buffers are made of, for a server of these SGLang arguments.

    Args:
        server_args: resolved, with the LSA configuration on them.
        model: SGLang's ModelConfig.
        layers: that keep KV.
        itemsize: bytes of one number of KV.
        extra_context: tokens of a row of SGLang's table beyond the model's context.
        tp_size: ranks that share the heads.
    """
    server_args = resolved(server_args)
    on_gpu, requests = server_args.device == "cuda", server_args.max_running_requests
    if (index := native_index(model)) is not None:
        context = model.context_len + extra_context
        sizes = {"rows": requests + 1, "context_tokens": context, "c128_layers": len(c128_layers(model))}
        return sizing_dsv4.dsv4_needs(server_args.lsa_config, index, **sizes)
    return selector_needs(
        server_args.lsa_config,
        kv_page(model, layers=layers, itemsize=itemsize, tp_size=tp_size),
        rows=requests + 1,
        chunk_tokens=chunk if (chunk := server_args.chunked_prefill_size or 0) > 0 else server_args.max_prefill_tokens,
        graph_batches=captured_batches(server_args.cuda_graph_config.decode, requests) if on_gpu else (),
        context_tokens=model.context_len + extra_context,
        layers=layers,
        q_heads=model.num_attention_heads // tp_size,
        kv_heads=model.get_num_kv_heads(tp_size),
        head_dim=model.head_dim,
        itemsize=shown_itemsize(model, itemsize),
        map_bytes=4 if on_gpu else 8,
        ranks=tp_size,
        on_gpu=on_gpu,
    )


def captured_batches(graphs: Any, requests: int) -> tuple[int, ...]:
    """For how many requests SGLang captures decode CUDA graphs: as configured, but for no more than can run.

    Args:
        graphs: of SGLang's ``cuda_graph_config``, for decode.
        requests: that run at the same time.
    """
    if graphs.backend == "disabled":
        return ()
    return tuple(sorted({min(size, requests) for size in graphs.bs or [graphs.max_bs] if size}))


def kv_page(model: Any, *, layers: int, itemsize: int, tp_size: int) -> PageShape:
    """What a page of KV weighs on one rank; arguments as for :func:`server_needs`."""
    if native_index(model) is not None:
        return dsv4_shape(len(c4_layers(model)))
    shape = model.get_num_kv_heads(tp_size), model.head_dim, model.v_head_dim, itemsize
    return mha_shape(PAGE_SIZE, layers, *shape, decoded=shown_itemsize(model, itemsize) if itemsize == FP8 else 0)


def budgeted_tokens(model: Any, stock_tokens: int) -> int:
    """Tokens of pages in the bytes that SGLang would give to ``stock_tokens`` tokens of such KV."""
    if native_index(model) is None:
        return stock_tokens
    return sizing_dsv4.budgeted_tokens(stock_tokens, len(c4_layers(model)), len(c128_layers(model)))


def stock_tokens(server_args: Any, model: Any, page: PageShape, budget_bytes: int) -> int:
    """Tokens for which SGLang would have KV in so many bytes, in whole pages.

    Args:
        page: from :func:`kv_page`.
    """
    limit = server_args.max_total_tokens
    if native_index(model) is None:
        pages = min(budget_bytes // page.page_bytes, (limit if limit is not None else budget_bytes) // page.page_tokens)
        return pages * page.page_tokens
    from sglang.srt.model_executor.pool_configurator import DSV4PoolConfigurator

    whole = SimpleNamespace(start_layer=0, end_layer=len(model.compress_ratios))
    asked = SimpleNamespace(
        kv_cache_dtype_str=server_args.kv_cache_dtype,
        model_config=model,
        layer_info=whole,
        ps=SimpleNamespace(pp_size=1, attn_dp_size=1),
        server_args=server_args,
        spec_algorithm=SimpleNamespace(is_none=lambda: True, is_eagle=lambda: False),
    )
    found = DSV4PoolConfigurator(asked).calculate_pool_sizes(budget_bytes, page.page_tokens).full_max_total_num_tokens
    return min(found, limit // page.page_tokens * page.page_tokens) if limit is not None else found


def shown_itemsize(model: Any, itemsize: int) -> int:
    """Bytes of one number of KV as it is shown: FP8 is in the type that the model computes in."""
    return model.dtype.itemsize if itemsize == FP8 else itemsize


def free_memory_of_cpu() -> int:
    """Bytes that SGLang counts as free where the CPU is its device."""
    from sglang.srt.utils.common import get_available_gpu_memory

    return int(get_available_gpu_memory("cpu", 0) * GB)


@contextmanager
def as_if_gpu(total_bytes: int) -> Iterator[None]:
    """Inside, SGLang and LSA decide as on a GPU of this size: chunks, CUDA graphs, ``--mem-fraction-static``. Nothing
    runs on it."""
    sized_by: Any = importlib.import_module(installed().sized_by)
    capacity, cuda = sized_by.get_device_memory_capacity, compatibility._cuda
    sized_by.get_device_memory_capacity = lambda device=None: total_bytes / (1 << 20)
    compatibility._cuda = lambda: True
    try:
        yield
    finally:
        sized_by.get_device_memory_capacity, compatibility._cuda = capacity, cuda
