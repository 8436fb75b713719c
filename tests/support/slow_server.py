"""LSA's server on a GPU whose copies and forward passes are late at random: ``python -m slow_server [flags]``.

Kernels that only wait are queued before copies and passes, so that everything that relies on order without an event
to keep it comes out of order. Results must not change.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from sglang_lsa import launch_server
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.engine.step import EXTEND
from sglang_lsa.memory.staging import StagedPages
from sglang_lsa.memory.transfer import StreamTransfer

CYCLES_A_MS = 1_500_000
"""Roughly, of a GPU clock."""
RANDOM = random.Random(0)


def wait(most_ms: float) -> None:
    """Let the current stream do nothing for a while."""
    torch.cuda._sleep(int(RANDOM.random() * most_ms * CYCLES_A_MS))


def install_delays() -> None:
    copy, fill, before_forward = StreamTransfer._copy, StagedPages._fill, LSARuntime.before_forward

    def late_copy(self: StreamTransfer, stream: torch.cuda.Stream, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.stream(stream):
            wait(8)
        return copy(self, stream, *arguments, **options)

    def late_fill(self: StagedPages, item: int) -> None:
        if self.staging.copies is not None and item % 7 == 0:
            with torch.cuda.stream(self.staging.copies):
                wait(1)
        fill(self, item)

    def late_forward(self: LSARuntime, batch: Any, new_pages: Any) -> int:
        number = before_forward(self, batch, new_pages)
        with self.on_stream():
            wait(4 if batch.kind == EXTEND else 0.5)
        return number

    StreamTransfer._copy, StagedPages._fill, LSARuntime.before_forward = late_copy, late_fill, late_forward  # type: ignore


if __name__ in ("__main__", "__mp_main__"):
    install_delays()
if __name__ == "__main__":
    launch_server.main()
