"""copy_engine: pages of the host mirror to the device without a kernel, where they lie side by side.

A kernel that reads the host holds multiprocessors while it waits for the bus; the attention that runs beside it then
has fewer. The GPU's copy engines take none, and copy rows of a pitched buffer in one call.
"""

from __future__ import annotations

import numpy as np
import torch

LEAST = 8
"""Pages that lie side by side, on average, for which calls of the host are worth it: each takes some microseconds, in
which the bus copies a page or two of one layer."""


def runs(ids: np.ndarray, together: int) -> tuple[tuple[int, int], ...] | None:
    """Ids that follow each other, as (first, how many), in order; None if they are too scattered for copy engines.

    Args:
        ids: int64 ``[n]``, pages of the mirror.
        together: pages that were page-locked by one call, see :class:`HostMirror`; a run has no others.
    """
    begins = np.flatnonzero((np.diff(ids, prepend=-2) != 1) | (ids % together == 0))
    if len(begins) * LEAST > len(ids) and len(begins) > 1:
        return None
    counts = np.diff(begins, append=len(ids))
    return tuple(zip(ids[begins].tolist(), counts.tolist(), strict=True))


def copy_runs(mirror: torch.Tensor, offset: int, found: tuple[tuple[int, int], ...], target: torch.Tensor) -> str:
    """Queue copies of one piece of these pages on the current stream.

    Args:
        mirror: uint8 ``[virtual_pages + 1, page_bytes]``, page-locked.
        offset: where the piece begins in a page.
        found: of :func:`runs`.
        target: uint8 ``[pages or more, bytes]`` on the device, contiguous: the pages go there one after the other.

    Returns:
        Why CUDA refused one of them, and then nothing can be said about ``target``; "" if it took all.
    """
    from cuda.bindings import runtime

    page, width, stream = mirror.shape[1], target.shape[1], torch.cuda.current_stream().cuda_stream
    source, at = mirror.data_ptr() + offset, target.data_ptr()
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    for first, count in found:
        (error,) = runtime.cudaMemcpy2DAsync(at, width, source + first * page, page, width, count, kind, stream)
        if error != runtime.cudaError_t.cudaSuccess:
            runtime.cudaGetLastError()  # or whoever looks next takes it for their own
            return str(error.name)
        at += count * width
    return ""
