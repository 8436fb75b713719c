"""ResidentTable: the static tables that attention reads; remap changes one row of them."""

from __future__ import annotations

import numpy as np
import torch


class ResidentTable:
    """Per request row: the physical pages that decode may read, their number, and the page where the tail starts.

    Row 0 is SGLang's padding row: no resident pages, a tail that starts at 0.
    """

    def __init__(self, rows: int, max_pages: int, device: str | torch.device = "cpu"):
        self.pages = torch.zeros((rows, max_pages), dtype=torch.int64, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tail_start = torch.zeros(rows, dtype=torch.int64, device=device)

    def remap(self, row: int, physical: np.ndarray, tail_start: int) -> None:
        """From now on ``row`` reads the pages ``physical``, in this order, and every token from ``tail_start`` on.

        Args:
            physical: int64 ``[n]``.
            tail_start: in pages.
        """
        self.pages[row, : len(physical)] = torch.from_numpy(physical).to(self.pages.device)
        self.count[row] = len(physical)
        self.tail_start[row] = tail_start

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.pages, self.count, self.tail_start))
