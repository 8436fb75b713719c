"""Page arithmetic. A page is ``page`` consecutive tokens of KV for all layers; how many is the KV layout's to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def pages_spanned(tokens: int, page: int) -> int:
    """Pages that ``tokens`` tokens touch, the last one perhaps partly filled."""
    return -(-tokens // page)


def pages_complete(tokens: int, page: int) -> int:
    """Pages that ``tokens`` tokens fill."""
    return tokens // page


def align_up(tokens: int, page: int) -> int:
    """The smallest multiple of the page size that is at least ``tokens``."""
    return pages_spanned(tokens, page) * page


def pages_of(slots: torch.Tensor, page: int) -> np.ndarray:
    """Pages in which token slots lie, int64 ``[n]`` on the host."""
    return (slots.cpu().numpy() // page).astype(np.int64)
