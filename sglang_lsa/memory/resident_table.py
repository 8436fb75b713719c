"""ResidentTable: the static table that attention reads; remap changes one row of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_lsa.memory.transfer import upload

COUNT, TAIL_START, PAGES = 0, 1, 2
"""Columns: number of resident pages, page where the tail starts, then the physical ids of the resident pages."""


class ResidentTable:
    """Per request row: the physical pages that decode may read, their number, and the page where the tail starts.

    ``table`` is int32 ``[rows, 2 + max_pages]`` on the device. Row 0 is SGLang's padding row: no resident pages, a tail
    that starts at 0. What the host must know to plan attention is kept in :attr:`shortening`, changed by the same call.

    Args:
        page: tokens of a page.
    """

    def __init__(self, rows: int, max_pages: int, page: int, device: str | torch.device = "cpu"):
        self.page = page
        self.table = torch.zeros((rows, PAGES + max_pages), dtype=torch.int32, device=device)
        self.shortening = np.zeros(rows, dtype=np.int64)
        """``[rows]`` tokens that decode leaves out: a request of ``n`` tokens reads ``n - shortening[row]``."""

    @property
    def pages(self) -> torch.Tensor:
        return self.table[:, PAGES:]

    @property
    def count(self) -> torch.Tensor:
        return self.table[:, COUNT]

    @property
    def tail_start(self) -> torch.Tensor:
        return self.table[:, TAIL_START]

    @property
    def rows(self) -> int:
        return len(self.shortening)

    @property
    def max_pages(self) -> int:
        return self.table.shape[1] - PAGES

    def remap(self, row: int, physical: np.ndarray, tail_start: int) -> None:
        """From now on ``row`` reads the pages ``physical``, in this order, and every token from ``tail_start`` on.

        On a GPU "from now on" means what is queued on the current stream after this call, and plans made after it.

        Args:
            physical: int64 ``[n]``, ``n`` at most ``max_pages``.
            tail_start: in pages.
        """
        values = np.concatenate(([len(physical), tail_start], physical)).astype(np.int32)
        self.table[row, : len(values)] = upload(values, self.table.device)
        self.shortening[row] = (tail_start - len(physical)) * self.page

    def remap_all(self, rows: np.ndarray, sets: Sequence[np.ndarray], tail_starts: np.ndarray) -> None:
        """The same for several rows, with one copy.

        Args:
            rows: int64 ``[n]``, all different.
            sets: of each row the physical pages, as in :meth:`remap`.
            tail_starts: int64 ``[n]``, in pages.
        """
        counts = np.array([len(pages) for pages in sets], dtype=np.int64)
        values = np.zeros((len(rows), PAGES + counts.max(initial=0)), dtype=np.int32)
        values[:, COUNT], values[:, TAIL_START] = counts, tail_starts
        for row, pages in zip(values, sets, strict=True):
            row[PAGES : PAGES + len(pages)] = pages
        source, places = (upload(array, self.table.device) for array in (values, rows))
        self.table[places, : values.shape[1]] = source
        self.shortening[rows] = (tail_starts - counts) * self.page

    def lengths(self, rows: np.ndarray, seq_lens: np.ndarray) -> np.ndarray:
        """Tokens that decode reads of each request, int64 ``[batch]``; the device computes the same from the table."""
        return seq_lens - self.shortening[rows]

    @property
    def nbytes(self) -> int:
        return self.table.numel() * self.table.element_size()
