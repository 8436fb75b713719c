"""What a prefill pass reads before its own tokens: all of it in place, a part in place and the rest from the host, or
only a resident set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sglang_lsa.memory.pages import pages_spanned

IN_PLACE = "in place"
"""Exact; all pages of the prompt are on the device until the first resident set is there."""
STREAMED = "streamed"
"""Exact; only the pages being written are sure to be on the device, others are read from the host mirror."""
RESIDENT = "resident"
"""Not exact: of a cached prefix, only a predicted resident set is read."""


@dataclass(frozen=True)
class Reading:
    """What one request's pass reads of the tokens before its own.

    Attributes:
        page: tokens of a page.
        prefix: tokens before the pass's own.
        here: virtual pages read in place, in order of position; the last may be partly filled.
        streamed: virtual pages read from the host mirror, all of them complete.
        tokens_here: tokens of the pages in ``here``.
    """

    page: int
    prefix: int
    here: np.ndarray
    streamed: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tokens_here: int = 0

    @classmethod
    def of(cls, pages: np.ndarray, prefix: int, here: np.ndarray, streamed: np.ndarray, page: int) -> Reading:
        """From masks over ``pages``, the virtual pages of the prefix.

        Raises:
            ValueError: a partly filled page is to be streamed; it has no mirror copy.
        """
        unfilled = pages_spanned(prefix, page) * page - prefix
        if unfilled and streamed[-1]:
            raise ValueError(f"the last page of {prefix} tokens is not complete and cannot be read from the mirror")
        tokens = int(here.sum()) * page - (unfilled if len(here) and here[-1] else 0)
        return cls(page, prefix, pages[here], pages[streamed], tokens)

    @classmethod
    def all_of(cls, pages: np.ndarray, prefix: int, page: int) -> Reading:
        """Everything, in place."""
        return cls(page, prefix, pages, tokens_here=prefix)

    @property
    def whole(self) -> bool:
        """Whether everything is read, and in place."""
        return self.tokens_here == self.prefix

    def slots(self, v2p: np.ndarray) -> torch.Tensor:
        """Physical slots of what is read in place, int64 ``[tokens_here]``.

        Args:
            v2p: the ledger's map.
        """
        first = torch.from_numpy(v2p[self.here] * self.page)
        return (first[:, None] + torch.arange(self.page)).flatten()[: self.tokens_here]
