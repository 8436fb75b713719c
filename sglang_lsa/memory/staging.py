"""Staging: two buffers through which prefill reads pages of the host mirror that are not on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sglang_lsa.kernels.page_move import move_pages_reference, move_pages_triton, moves
from sglang_lsa.memory.copy_engine import copy_runs, runs
from sglang_lsa.memory.layout.base import KVLayout, PageShape
from sglang_lsa.memory.transfer import ids_on

logger = logging.getLogger(__name__)

ALIGNED = 16
"""Bytes; of each piece, the pages in a buffer begin at a multiple."""


def staging_bytes(pages: int, shape: PageShape) -> int:
    """Device bytes of both buffers: the largest layer of ``pages`` pages, twice. No context enters."""
    return 2 * max(_bounds(pages, widths)[-1] for widths in shape.layers)


def decoded_bytes(pages: int, shape: PageShape) -> int:
    """Device bytes of what attention reads of two blocks of ``pages`` pages, where it cannot read them as they lie.

    Two: a block is decoded while whoever read the one before may still hold it.
    """
    return 2 * pages * max(map(sum, shape.layers)) * shape.decoded


def _bounds(pages: int, widths: Sequence[int]) -> list[int]:
    """Where in a buffer the pages of each piece of a layer begin, and the last ones end, in bytes."""
    return [0, *np.cumsum([-(-pages * width // ALIGNED) * ALIGNED for width in widths]).tolist()]


def sums_bytes(tokens: int, q_heads: int, head_dim: int) -> int:
    """Device bytes of the float32 sums into which one layer's parts are merged, for a chunk of ``tokens``."""
    return tokens * q_heads * (head_dim + 1) * 4


class Staging:
    """Two buffers of ``pages`` pages, one layer each: while attention reads one, the other is filled.

    On a GPU they are filled on a stream of their own, by the copy engines where pages lie side by side in the mirror,
    as those of a long prompt mostly do. Others are copied by a kernel; its stream is of high priority, so that its few
    programs are not kept waiting by the many of an attention kernel. On a CPU a block is copied when it is asked for.

    Args:
        layout: of the device pool.
        mirror: uint8 ``[virtual_pages + 1, page_bytes]`` host memory.
        pages: of one block.
        compute: returns the stream on which the model runs (GPU).
        together: pages of the mirror that were page-locked by one call; all of them unless told otherwise.
    """

    def __init__(
        self,
        layout: KVLayout,
        mirror: torch.Tensor,
        pages: int,
        compute: Callable[[], torch.cuda.Stream],
        together: int | None = None,
    ):
        self.layout, self.mirror, self.pages, self.compute = layout, mirror, pages, compute
        self.together = len(mirror) if together is None else together
        self.refused = ""
        """Why copy engines are not used any more; "" if they are."""
        self.page, self.device = layout.page_tokens, layout.device
        self.layers = tuple(layout.by_layer)
        """Those that have pages, in their order."""
        self.buffers = torch.empty((2, staging_bytes(pages, layout.shape) // 2), dtype=torch.uint8, device=self.device)
        self.places = torch.arange(pages, device=self.device)
        """Where the pages of a block lie in a buffer."""
        self.parts = [[self._parts(buffer, layer) for layer in self.layers] for buffer in self.buffers]
        """Of each buffer for each layer: uint8 ``[pages, bytes]`` for each piece."""
        self.moves = [
            [
                moves(parts, [piece.offset for piece in layout.by_layer[layer]], mirror)
                for layer, parts in zip(self.layers, by_layer, strict=True)
            ]
            for by_layer in self.parts
        ]
        self.move = move_pages_triton if self.device.type == "cuda" else move_pages_reference
        self.copies: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self.copies = torch.cuda.Stream(priority=-1)
            self.filled = [torch.cuda.Event() for _ in range(2)]
            self.free = [torch.cuda.Event() for _ in range(2)]
        self.staged_pages = 0
        """Pages read this way, all layers of a page counted as one."""

    @property
    def nbytes(self) -> int:
        return self.buffers.numel()

    def _parts(self, buffer: torch.Tensor, layer: int) -> tuple[torch.Tensor, ...]:
        widths = [piece.nbytes for piece in self.layout.by_layer[layer]]
        begins = _bounds(self.pages, widths)
        return tuple(
            buffer[begin : begin + self.pages * width].view(self.pages, width)
            for begin, width in zip(begins, widths, strict=False)
        )

    def read(self, virtual: np.ndarray) -> StagedPages:
        """One forward pass that reads these pages, every layer in turn."""
        self.staged_pages += len(virtual)
        return StagedPages(self, virtual)


class StagedPages:
    """Pages that one forward pass reads, in blocks: the layers that have pages in their order, in each all blocks.

    Args:
        staging: whose buffers it uses; no other pass may use them until this one is queued.
        virtual: ``[n]`` virtual pages, all with a complete mirror copy.
    """

    def __init__(self, staging: Staging, virtual: np.ndarray):
        self.staging = staging
        ids = ids_on(staging.device, virtual)
        self.blocks = ids.split(staging.pages) if len(virtual) else ()
        starts = range(0, len(virtual), staging.pages)
        self.runs = [runs(virtual[start : start + staging.pages], staging.together) for start in starts]
        """Of each block, its pages that lie side by side in the mirror; None where too few do."""
        self.sizes = [len(block) * staging.page for block in self.blocks]
        """Tokens of each block; all but the last are equal."""
        self._next = 0
        self._end = len(staging.layers) * len(self.blocks)
        if staging.copies is not None and self.blocks:
            staging.copies.wait_stream(torch.cuda.current_stream())  # the ids are uploaded on this stream
            for event in staging.free:
                event.record()  # what was queued before may still read the buffers

    def layer(self, layer: int, raw: bool = False) -> Iterator[Any]:
        """Of each block what attention reads, see :meth:`KVLayout.staged`, valid until the next one is asked for.

        A layer without pages has no blocks.

        Args:
            raw: attention reads the type in which the pool keeps KV, see :meth:`KVLayout.staged_raw`.

        Raises:
            RuntimeError: layers are not asked for in their order.
        """
        layers = self.staging.layers
        if layer not in layers:
            return
        for block in range(len(self.blocks)):
            item = layers.index(layer) * len(self.blocks) + block
            if item != self._next:
                due = (*layers, layers[-1] + 1)[self._next // len(self.blocks)]
                raise RuntimeError(f"layer {layer} was asked for when {due} was next")
            self._next += 1
            yield self._take(item, raw)

    def _take(self, item: int, raw: bool) -> Any:
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
        layer, block = divmod(item, len(self.blocks))
        pages = len(self.blocks[block])
        read = staging.layout.staged_raw if raw else staging.layout.staged
        return read(staging.layers[layer], tuple(part[:pages] for part in staging.parts[slot][layer]))

    def _fill(self, item: int) -> None:
        staging, slot = self.staging, item % 2
        layer, block = divmod(item, len(self.blocks))
        if staging.copies is None:
            self._copy(slot, layer, block)
            return
        staging.copies.wait_event(staging.free[slot])
        with torch.cuda.stream(staging.copies):
            self._copy(slot, layer, block)
            staging.filled[slot].record()

    def _copy(self, slot: int, layer: int, block: int) -> None:
        staging, ids, found = self.staging, self.blocks[block], self.runs[block]
        if staging.copies is not None and found is not None and not staging.refused:
            pieces = staging.layout.by_layer[staging.layers[layer]]
            for piece, part in zip(pieces, staging.parts[slot][layer], strict=True):
                staging.refused = staging.refused or copy_runs(staging.mirror, piece.offset, found, part)
            if not staging.refused:
                return
            logger.warning("LSA: CUDA refused to copy pages without a kernel (%s): a kernel does it", staging.refused)
        staging.move(staging.moves[slot][layer], staging.places[: len(ids)], staging.mirror, ids, to_host=False)
