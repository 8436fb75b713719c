"""Page arithmetic. A page is ``PAGE_SIZE`` consecutive tokens of KV for all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sglang_lsa.config import PAGE_SIZE

if TYPE_CHECKING:
    import torch


def pages_spanned(tokens: int) -> int:
    """Pages that ``tokens`` tokens touch, the last one perhaps partly filled."""
    return -(-tokens // PAGE_SIZE)


def pages_complete(tokens: int) -> int:
    """Pages that ``tokens`` tokens fill."""
    return tokens // PAGE_SIZE


def align_up(tokens: int) -> int:
    """The smallest multiple of the page size that is at least ``tokens``."""
    return pages_spanned(tokens) * PAGE_SIZE


def pages_of(slots: torch.Tensor) -> np.ndarray:
    """Pages in which token slots lie, int64 ``[n]`` on the host."""
    return (slots.cpu().numpy() // PAGE_SIZE).astype(np.int64)
