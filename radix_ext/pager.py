"""Pager: the ledger's decisions carried out on real memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from sglang_lsa.kernels.page_copy import pages_from_host, pages_to_host
from sglang_lsa.radix_ext.host_mirror import HostMirror
from sglang_lsa.radix_ext.ledger import Ledger


class Pager:
    """Device pool, host mirror and the ledger between them.

    Args:
        keys, values: per layer ``[(physical_pages + 1) * page, kv_heads, head_dim]``, SGLang's own pool buffers.
        virtual_pages: capacity of the host mirror.
        page: tokens in a page.
    """

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], virtual_pages: int, page: int):
        rows, kv_heads, head_dim = keys[0].shape
        self.keys, self.values, self.page = keys, values, page
        self.ledger = Ledger(virtual_pages, rows // page - 1)
        self.mirror = HostMirror(virtual_pages, len(keys), page, kv_heads, head_dim, keys[0].dtype)
        self.v2p = torch.from_numpy(self.ledger.v2p)
        """int64 ``[virtual_pages + 1]``; shares memory with the ledger, so it is never out of date."""
        self.reserved: dict[str, int] = {}
        """Device pages promised to prompts that are still being prefilled, by request."""
        self.stored_pages = 0

    def hold(self, holder: str, pages: Iterable[int]) -> bool:
        """Make ``pages`` resident for ``holder`` and bring in the content of those that were not.

        Returns False, with nothing changed, when the device pool cannot take them now.
        """
        plan = self.ledger.hold(holder, pages)
        if plan is None:
            return False
        virtual, physical = (torch.from_numpy(ids) for ids in plan.recall)
        if len(virtual):
            pages_from_host(self.keys, self.values, physical, self.mirror.pages, virtual)
        return True

    def hold_if_spare(self, holder: str, pages: np.ndarray, spare: int) -> bool:
        """Like :meth:`hold`, but never takes pages promised to prompts, nor the last ``spare`` ones.

        For what can wait: a resident set that is not brought in costs a window, a page to write to costs a request.
        """
        wanted = int((~self.ledger.is_held(pages)).sum())
        if wanted and wanted + spare > self.unpromised_pages:
            return False
        return self.hold(holder, pages)

    def store(self, pages: np.ndarray) -> None:
        """Copy complete pages to the host mirror; from here on their device copies may be given up."""
        if not len(pages):
            return
        physical = torch.from_numpy(self.ledger.v2p[pages])
        pages_to_host(self.keys, self.values, physical, self.mirror.pages, torch.from_numpy(pages))
        self.ledger.mirrored(pages)
        self.stored_pages += len(pages)

    def forget(self, holder: str) -> None:
        """``holder`` is gone (finished, aborted, retracted): it needs nothing any more."""
        self.ledger.drop(holder)
        self.reserved.pop(holder, None)

    def reset(self) -> None:
        """Forget every page. Raises LedgerError, with nothing changed, while one is held or read."""
        self.ledger.reset()
        self.reserved.clear()

    @property
    def unpromised_pages(self) -> int:
        """Device pages that can be had now and that no prompt in prefill is waiting for."""
        return self.ledger.obtainable_pages - sum(self.reserved.values())

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of KV, all layers."""
        return self.mirror.page_bytes
