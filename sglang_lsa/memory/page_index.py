"""PageIndex: which pages SGLang's slot tensors name, known on the host, so that nobody waits for the device.

SGLang keeps slots on the device: in its table of requests, in the nodes of the radix tree, in what a prefix match
returns. Reading one back waits for everything that is queued, beside a prefill for all of it. But whatever is in them
came from the allocator, which knows its pages on the host too, and went through a request whose pages are known; so
the index follows the tensors instead: a node's from the request that inserted it, through every split, and a request's
row while the tree takes it over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary


class PageIndex:
    """Host copies of page ids, by tensor; a tensor that nobody refers to any more is forgotten.

    Args:
        page: tokens in a page.
    """

    def __init__(self, page: int):
        self.page = page
        self.checked = False
        """Whether every answer is compared with the device, which waits for it (``--lsa-debug``)."""
        self.reads = 0
        """Answers that nobody knew on the host, so that the device was waited for."""
        self._known = WeakTensorKeyDictionary()
        self._open: list[tuple[torch.Tensor, np.ndarray]] = []
        """Tensors of which views are known, too."""

    # -- what is known -------------------------------------------------------------------------------------------

    def note(self, slots: torch.Tensor, pages: np.ndarray) -> None:
        """``slots``, the ones of whole pages, are those of ``pages``, int64 ``[len(slots) / page]``."""
        if len(pages) * self.page != len(slots):
            raise ValueError(f"{len(slots)} slots are not those of {len(pages)} pages of {self.page}")
        self._known[slots] = pages

    def noted(self, slots: torch.Tensor) -> np.ndarray | None:
        """What :meth:`note` was told of this very tensor."""
        return self._known.get(slots)

    @contextmanager
    def row(self, slots: torch.Tensor, pages: np.ndarray | None) -> Iterator[None]:
        """Inside, views of this row of SGLang's table, or of a copy of it, are known too.

        Args:
            slots: the row, from its first token on.
            pages: of its tokens, as many as are known; None for nothing.
        """
        depth = len(self._open)
        if pages is not None:
            self._open.append((slots, pages))
        try:
            yield
        finally:
            del self._open[depth:]

    def views(self, slots: torch.Tensor, pages: np.ndarray) -> None:
        """Until the :meth:`row` that was opened last is closed, views of ``slots``, which has these whole pages, are
        known too. Does nothing outside of one."""
        if self._open:
            self._open.append((slots, pages))

    # -- questions -----------------------------------------------------------------------------------------------

    def pages(self, slots: torch.Tensor) -> np.ndarray:
        """Pages of consecutive tokens of one request, each once and in their order, int64 ``[n]``.

        Args:
            slots: a noted tensor, a view of what is open, or any other, which is read and counted.
        """
        known = self._known.get(slots)
        if known is None:
            known = self._in_row(slots)
        return self._answer(known, lambda: self._read(slots))

    def matched(self, slots: torch.Tensor, path: Iterable[torch.Tensor]) -> np.ndarray:
        """Pages of what a match in the radix tree returned: ``slots``, noted or those along ``path``."""
        known = self._known.get(slots)
        if known is None:
            known = self.path(path)
        if known is not None and len(known) * self.page != len(slots):
            known = None
        return self._answer(known, lambda: self._read(slots[:: self.page]))

    def path(self, upwards: Iterable[torch.Tensor]) -> np.ndarray | None:
        """Pages from the root of the radix tree to a node, int64 ``[n]``; None if there is one that is not known.

        They never change: a split puts a new node above an old one, and the ids of both together are as before.

        Args:
            upwards: slots of each node, from the lowest one up.
        """
        parts: list[np.ndarray] = []
        for slots in upwards:
            part = self._known.get(slots)
            if part is None:
                return None
            parts.append(part)
        return np.concatenate([np.zeros(0, dtype=np.int64), *reversed(parts)])

    # -- inside --------------------------------------------------------------------------------------------------

    def _in_row(self, slots: torch.Tensor) -> np.ndarray | None:
        if not self._open or slots.stride() != (1,):
            return None
        address = slots.untyped_storage().data_ptr()
        for row, pages in reversed(self._open):
            first = slots.storage_offset() - row.storage_offset()
            last = first + len(slots)
            covered = -(-last // self.page) if slots.numel() else 0
            same = address == row.untyped_storage().data_ptr()
            if same and 0 <= first <= last <= len(row) and covered <= len(pages):
                return pages[first // self.page : covered]
        return None

    def _answer(self, known: np.ndarray | None, read: Callable[[], np.ndarray]) -> np.ndarray:
        if known is None:
            self.reads += 1
            return read()
        if self.checked and not np.array_equal(known, seen := read()):
            raise RuntimeError(f"LSA: the host knows pages {known.tolist()} where the device has {seen.tolist()}")
        return known

    def _read(self, slots: torch.Tensor) -> np.ndarray:
        pages = slots.cpu().numpy().astype(np.int64) // self.page
        return pages[np.append(True, pages[1:] != pages[:-1])] if len(pages) else pages
