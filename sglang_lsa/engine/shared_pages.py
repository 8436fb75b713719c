"""What the radix tree and the requests know of each other's pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from sglang_lsa.engine.admission import Admission
from sglang_lsa.engine.reading import RESIDENT
from sglang_lsa.engine.remap import ResidentSets
from sglang_lsa.engine.request import Request
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_spanned


class SharedPages:
    """Asked by the radix tree while a request's tokens are inserted.

    Args:
        requests: by name, those that are computed.
        req_to_token: ``[requests + 1, max_context]`` SGLang's table of virtual slots.
        on_stream: inside, kernels are queued behind the forward passes.
    """

    def __init__(
        self,
        pager: Pager,
        sets: ResidentSets,
        admission: Admission,
        requests: Mapping[str, Request],
        req_to_token: torch.Tensor,
        on_stream: Callable[[], AbstractContextManager[Any]],
    ):
        self.pager, self.sets, self.admission = pager, sets, admission
        self.requests, self.req_to_token, self.on_stream = requests, req_to_token, on_stream

    def known(self, key: str, row: int) -> np.ndarray | None:
        """Virtual pages of a request's tokens in this row of SGLang's table, int64 ``[pages]``; None if it was never
        computed there."""
        request = self.requests.get(key)
        return request.pages if request is not None and request.row == row else None

    def after_passes(self) -> None:
        """What is queued on the current stream from now on comes after the forward passes that are queued (GPU).

        SGLang lets its scheduler write into ``req_to_token`` as soon as a CUDA graph is launched, since attention has
        read it before; a graph that makes its page table itself reads it later.
        """
        if self.pager.device.type == "cuda":
            torch.cuda.current_stream(self.pager.device).wait_stream(self.pager.compute())

    def replaced(self, key: str, row: int, tokens: int, own: np.ndarray | None, shared: np.ndarray) -> None:
        """The tree has the first pages of this request already: from now on it uses the tree's.

        Args:
            row: its row of SGLang's table.
            tokens: how many tokens of the request have KV.
            own: its pages as far as they are known; under the overlap scheduler it may have opened one more since.
            shared: the tree's pages of its first tokens.
        """
        request = self.requests.get(key)
        if own is None:
            slots = self.req_to_token[row, :tokens]
            own = self.pager.page_index.pages(slots)
        before = own[: pages_spanned(tokens, self.pager.page)]
        after = before.copy()
        after[: len(shared)] = shared
        if (before == after).all():
            return
        self.pager.substitute(key, before, after)
        if request is None:
            return
        request.pages = np.concatenate((after, own[len(before) :]))
        with self.on_stream():
            self.pager.require(after[self.pager.ledger.on_device(after)])
            self.sets.moved(request)

    def is_exact(self, key: str) -> bool:
        """Whether the request's prompt was computed over all of its tokens, so that others may use its KV."""
        admitted = self.admission.admitted.get(key)
        return admitted is None or admitted.how != RESIDENT
