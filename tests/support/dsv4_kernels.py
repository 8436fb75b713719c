"""Kernels of a DeepSeek-V4 server, compiled before it starts: one process for each, all at once.

TileLang makes the norm before a layer anew for every number of parts that its sum has, which depends on the tokens of a
batch: 21 kernels for chunks of 8,192 tokens, 20 to 30 s each where nothing is cached. SGLang compiles them while it
loads weights from files; with drawn weights a server stands still whenever a batch has a new size.

Run as a program: ``python dsv4_kernels.py CHUNK``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from dsv4_model import TINY

SECONDS = 180


def sizes(chunk: int) -> tuple[int, ...]:
    """Tokens of a batch, one number for each kernel that batches of up to ``chunk`` tokens need."""
    from sglang.kernels.ops.layernorm import mhc

    found: tuple[int, ...] = mhc.get_mhc_pre_token_count_representatives(chunk, TINY["hc_mult"] * TINY["hidden_size"])
    return found


def compile_one(tokens: int) -> None:
    """Call the kernel for a batch of ``tokens``, which leaves it in the caches on disk."""
    import torch
    from sglang.kernels.ops.layernorm import mhc

    # There is no group of ranks in this process.
    mhc.use_symmetric_memory = lambda *_, **__: contextlib.nullcontext()
    mhc.get_tp_group = mhc.is_allocation_symmetric = lambda: None
    copies, hidden = int(TINY["hc_mult"]), int(TINY["hidden_size"])
    rows = copies * (2 + copies)
    drawn = {"device": "cuda", "dtype": torch.float32}
    with torch.inference_mode():
        mhc.mhc_pre(
            torch.zeros(tokens, copies, hidden, dtype=torch.bfloat16, device="cuda"),
            torch.zeros(rows, copies * hidden, **drawn),
            torch.zeros(3, **drawn),
            torch.zeros(rows, **drawn),
            TINY["rms_norm_eps"],
            TINY["hc_eps"],
            TINY["hc_eps"],
            2.0,
            TINY["hc_sinkhorn_iters"],
            norm_weight=torch.ones(hidden, dtype=torch.bfloat16, device="cuda"),
            norm_eps=TINY["rms_norm_eps"],
        )
        torch.cuda.synchronize()


def compile_all(chunk: int) -> None:
    """Say what took how long; a kernel that does not compile here is one that a server compiles."""

    def run(tokens: int) -> str:
        began = time.perf_counter()
        command = [sys.executable, __file__, str(chunk), str(tokens)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode:
                return f"{tokens} tokens: failed\n{done.stderr[-1000:]}"
        return f"{tokens} tokens: {time.perf_counter() - began:.0f} s"

    with ThreadPoolExecutor(max(1, min(24, (os.cpu_count() or 2) - 2))) as pool:
        print(*pool.map(run, sizes(chunk)), sep="\n", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        compile_one(int(sys.argv[2]))
    else:
        compile_all(int(sys.argv[1]))
