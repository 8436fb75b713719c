"""What SGLang makes of its resolved arguments; asked by the server's hooks, and by the doctor, which starts none.

Imports SGLang where it is asked, so that whoever imports this need not have it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sglang_lsa.memory.mirror import GB
from sglang_lsa.patches import compatibility
from sglang_lsa.patches.releases import RELEASES


def extra_context(server_args: Any) -> int:
    """Tokens that a row of SGLang's table has room for beyond the context of the model."""
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len

    return get_req_to_token_extra_context_len(server_args)


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


def free_memory_of_cpu() -> int:
    """Bytes that SGLang counts as free where the CPU is its device."""
    from sglang.srt.utils.common import get_available_gpu_memory

    return int(get_available_gpu_memory("cpu", 0) * GB)


@contextmanager
def as_if_gpu(total_bytes: int) -> Iterator[None]:
    """Inside, SGLang and LSA decide as on a GPU of this size: chunks, CUDA graphs, ``--mem-fraction-static``. Nothing
    runs on it."""
    import sglang

    sized_by: Any = importlib.import_module(RELEASES[sglang.__version__].sized_by)
    capacity, cuda = sized_by.get_device_memory_capacity, compatibility._cuda
    sized_by.get_device_memory_capacity = lambda device=None: total_bytes / (1 << 20)
    compatibility._cuda = lambda: True
    try:
        yield
    finally:
        sized_by.get_device_memory_capacity, compatibility._cuda = capacity, cuda
