"""Staging: two buffers through which prefill reads pages of the host mirror that are not on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from sglang_lsa.kernels.stage_pages import stage_pages
from sglang_lsa.memory.transfer import ids_on


def staging_bytes(pages: int, page: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Device bytes of both buffers: keys and values of one layer of ``pages`` pages, twice. No context enters."""
    return 2 * 2 * pages * page * kv_heads * head_dim * itemsize


def sums_bytes(tokens: int, q_heads: int, head_dim: int) -> int:
    """Device bytes of the float32 sums into which one layer's parts are merged, for a chunk of ``tokens``."""
    return tokens * q_heads * (head_dim + 1) * 4


class Staging:
    """Two buffers of ``pages`` pages, one layer each: while attention reads one, the other is filled.

    On a GPU they are filled on a stream of their own, of high priority, so that a copy's few programs are not kept
    waiting by the many of an attention kernel; on a CPU a block is copied when it is asked for.

    Args:
        mirror: ``[virtual_pages + 1, layers, 2, page, kv_heads, head_dim]`` host memory.
        pages: of one block.
        device: where the buffers lie.
        compute: returns the stream on which the model runs (GPU).
    """

    def __init__(
        self, mirror: torch.Tensor, pages: int, device: torch.device, compute: Callable[[], torch.cuda.Stream]
    ):
        _, self.layers, _, self.page, kv_heads, head_dim = mirror.shape
        self.mirror, self.pages, self.device, self.compute = mirror, pages, device, compute
        self.buffers = torch.empty((2, 2, pages * self.page, kv_heads, head_dim), dtype=mirror.dtype, device=device)
        self.copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(priority=-1)
            self.filled = [torch.cuda.Event() for _ in range(2)]
            self.free = [torch.cuda.Event() for _ in range(2)]
        self.staged_pages = 0
        """Pages read this way, all layers of a page counted as one."""

    @property
    def nbytes(self) -> int:
        return self.buffers.numel() * self.buffers.element_size()

    def read(self, virtual: np.ndarray) -> StagedPages:
        """One forward pass that reads these pages, every layer in turn."""
        self.staged_pages += len(virtual)
        return StagedPages(self, virtual)


class StagedPages:
    """Pages that one forward pass reads, in blocks: the layers in their order, in each layer all blocks.

    Args:
        staging: whose buffers it uses; no other pass may use them until this one is queued.
        virtual: ``[n]`` virtual pages, all with a complete mirror copy.
    """

    def __init__(self, staging: Staging, virtual: np.ndarray):
        self.staging = staging
        ids = ids_on(staging.device, virtual)
        self.blocks = ids.split(staging.pages) if len(virtual) else ()
        self.sizes = [len(block) * staging.page for block in self.blocks]
        """Tokens of each block; all but the last are equal."""
        self._next = 0
        self._end = staging.layers * len(self.blocks)
        if staging.copies is not None and self.blocks:
            staging.copies.wait_stream(torch.cuda.current_stream())  # the ids are uploaded on this stream
            for event in staging.free:
                event.record()  # what was queued before may still read the buffers

    def layer(self, layer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each block, ``[tokens, kv_heads, head_dim]``, valid until the next one is asked for.

        Raises:
            RuntimeError: layers are not asked for in their order.
        """
        for block in range(len(self.blocks)):
            item = layer * len(self.blocks) + block
            if item != self._next:
                raise RuntimeError(f"layer {layer} was asked for when {self._next // len(self.blocks)} was next")
            self._next += 1
            yield self._take(item)

    def _take(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        staging, slot = self.staging, item % 2
        if staging.copies is None:
            self._fill(item)
        else:
            if item == 0:
                self._fill(0)
            else:  # the block before this one has been read by what is queued now
                staging.free[1 - slot].record()
            if item + 1 < self._end:
                self._fill(item + 1)
            staging.compute().wait_event(staging.filled[slot])
        tokens = self.sizes[item % len(self.blocks)]
        keys, values = staging.buffers[slot, :, :tokens]
        return keys, values

    def _fill(self, item: int) -> None:
        staging, slot = self.staging, item % 2
        layer, block = divmod(item, len(self.blocks))
        if staging.copies is None:
            stage_pages(staging.mirror, self.blocks[block], layer, *staging.buffers[slot])
            return
        staging.copies.wait_event(staging.free[slot])
        with torch.cuda.stream(staging.copies):
            stage_pages(staging.mirror, self.blocks[block], layer, *staging.buffers[slot])
            staging.filled[slot].record()
