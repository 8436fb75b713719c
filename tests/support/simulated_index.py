"""A model with an index of its own, for the simulation: its pages, what its index is asked, and whether both come back.

Index keys and queries are numbers made of a token's content, so that whoever scores pages can be asked whether it looks
at those of the request.
"""

from __future__ import annotations

import numpy as np
import torch
from simulated_gpu import LAYERS, SimulatedGPU
from simulated_work import Req, index_key

from sglang_lsa.engine.native_index import NativeIndex
from sglang_lsa.engine.observe_index import IndexRings, KeptIndexKeys
from sglang_lsa.engine.policies import Native, Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.kernels.retriever_score_paged import ENTRIES, VALUES
from sglang_lsa.memory.layout.dsv4 import INDEX_ROW, KV_ROW, Dsv4Layout

INDEX = NativeIndex(tuple(range(LAYERS)), 2, 128, 8, torch.float32)


def layout(physical: int) -> Dsv4Layout:
    """An empty pool whose index keys have a scale of 1."""
    kv, index = (
        {layer: torch.zeros((physical + 1, width), dtype=torch.uint8) for layer in range(LAYERS)}
        for width in (KV_ROW, INDEX_ROW)
    )
    for rows in index.values():
        rows[:, VALUES:] = torch.ones(ENTRIES).view(torch.uint8)
    return Dsv4Layout(kv, index)


def query(content: np.ndarray, layer: int) -> torch.Tensor:
    """What a token's index is asked in a layer, uint8 that are fp8 ``[tokens, heads, 128]``."""
    numbers = index_key(content * (layer + 3))
    return torch.from_numpy(np.tile(numbers, (1, 8))).view(-1, INDEX.heads, INDEX.head_dim)


class Observed:
    """Shows the observer every pass as it runs, as the attention backend does, and queues what keeps keys behind it.

    Args:
        gpu: may be far behind the host.
    """

    def __init__(self, runtime: LSARuntime, gpu: SimulatedGPU):
        rings, keys = runtime.observer, runtime.page_keys
        assert isinstance(rings, IndexRings) and isinstance(keys, KeptIndexKeys)
        self.rings, complete = rings, keys.complete

        def queued(virtual: np.ndarray, physical: np.ndarray) -> None:
            v, p = virtual.copy(), physical.copy()
            gpu.call(lambda: complete(v, p))

        keys.complete = queued  # type: ignore[method-assign]

    def __call__(self, layer: int, rows: np.ndarray, positions: np.ndarray, content: np.ndarray) -> None:
        self.rings.begin(torch.from_numpy(rows), torch.from_numpy(positions))
        weights = torch.ones((len(rows), INDEX.heads, 1))
        self.rings.capture_index_query(layer, query(content, layer).view(torch.float8_e4m3fn), weights)


class CheckedNative(Policy):
    """The policy of the server, after a look at what it scores by. It waits for the device."""

    name = "native"
    queries = True
    index = True

    def __init__(self, native: Policy, gpu: SimulatedGPU):
        assert isinstance(native, Native)
        self.native, self.gpu = native, gpu
        self.reqs: list[Req] = []
        """All that ever came."""
        self.wrong: list[str] = []
        self.looked = 0

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray | torch.Tensor:
        self.gpu.compute_to(len(self.gpu.compute))
        (req,) = [req for req in self.reqs if req.req_pool_idx == request.row and not req.gone]
        content = req.text[: len(request.pages)]
        for layer, table in enumerate(self.native.keys.tables):
            found = table[pages, :VALUES].numpy().reshape(len(pages), content.shape[1], -1)
            if wrong := int((found != index_key(content[: len(pages)])).any(axis=(1, 2)).sum()):
                self.wrong.append(f"{wrong} of {len(pages)} pages of {request.rid} have other keys in layer {layer}")
        at = self.native.observer.recent(request.first_observed, request.tokens)
        seen, _ = self.native.observer.queries(request.row, at)
        for layer in range(LAYERS):
            asked = query(content.reshape(-1)[at.numpy()], layer)
            if not torch.equal(seen[:, layer], asked):
                self.wrong.append(f"other queries of {request.rid} at {at.tolist()} in layer {layer}")
        self.looked += 1
        scores = self.native.score(request, pages)
        assert isinstance(scores, torch.Tensor) and bool(torch.isfinite(scores).all())
        return scores
