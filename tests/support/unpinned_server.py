"""LSA's server where no driver pins host memory: ``python -m unpinned_server [flags]``.

SGLang's LoRA asks for pinned memory on a CPU, too, and ends without a driver. Here memory stays as it is, which costs
speed and nothing else. SGLang spawns its scheduler, which imports this module as ``__mp_main__``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sglang_lsa import launch_server


def without_pinning() -> None:
    for name in ("tensor", "empty", "zeros", "ones", "full", "arange"):
        make = getattr(torch, name)

        @functools.wraps(make)
        def unpinned(*args: Any, _make: Any = make, pin_memory: bool = False, **more: Any) -> torch.Tensor:
            return _make(*args, **more)

        setattr(torch, name, unpinned)
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__") and not torch.cuda.is_available():
    without_pinning()
if __name__ == "__main__":
    launch_server.main()
