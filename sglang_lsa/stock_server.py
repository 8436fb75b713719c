"""Stock SGLang on a CPU without AMX, for comparisons: ``python -m sglang_lsa.stock_server [SGLang flags]``."""

from __future__ import annotations

import sys

from sglang_lsa.imports import without_collections


def let_sglang_run_on_this_cpu() -> None:
    """SGLang's rotary embedding looks for vLLM's CUDA kernel unless it knows that it runs on a CPU.

    It decides that by an environment variable that also selects kernels which SGLang's PyPI wheel does not carry. The
    flag set here is read in one condition of that module and nowhere else. Does nothing where there is a GPU.
    """
    import torch

    if torch.cuda.is_available():
        return
    from sglang.srt.layers.rotary_embedding import base

    base._is_cpu = True


def main(argv: list[str]) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    defaults = ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    run_server(prepare_server_args([*defaults, "--sleep-on-idle", *argv]))


# SGLang spawns its children, which import this module as __mp_main__ before they build the model.
if __name__ in ("__main__", "__mp_main__"):
    with without_collections():
        let_sglang_run_on_this_cpu()
if __name__ == "__main__":
    main(sys.argv[1:])
