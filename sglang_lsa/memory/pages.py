"""Page arithmetic. A page is ``page`` consecutive tokens of KV for all layers: ``PAGE_SIZE`` unless told otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sglang_lsa.config import PAGE_SIZE

if TYPE_CHECKING:
    import torch


def pages_spanned(tokens: int, page: int = PAGE_SIZE) -> int:
    """Pages that ``tokens`` tokens touch, the last one perhaps partly filled."""
    return -(-tokens // page)


def pages_complete(tokens: int, page: int = PAGE_SIZE) -> int:
    """Pages that ``tokens`` tokens fill."""
    return tokens // page


def align_up(tokens: int, page: int = PAGE_SIZE) -> int:
    """The smallest multiple of the page size that is at least ``tokens``."""
    return pages_spanned(tokens, page) * page


def pages_of(slots: torch.Tensor, page: int = PAGE_SIZE) -> np.ndarray:
    """Pages in which token slots lie, int64 ``[n]`` on the host."""
    return (slots.cpu().numpy() // page).astype(np.int64)
