"""Recorder: writes what an indexer is trained on, while a server computes the prompts of requests that ask for it."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sglang_lsa.config import RECORDED_POSITIONS
from sglang_lsa.engine.request import Request
from sglang_lsa.engine.step import Step
from sglang_lsa.indexer.model import key_runs
from sglang_lsa.indexer.recording import BLOCK, write_recording
from sglang_lsa.kernels.attention_mass import attention_mass
from sglang_lsa.kernels.bound_score import bound_score
from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.pages import pages_complete, pages_spanned

logger = logging.getLogger(__name__)


@dataclass
class Part:
    """What one forward pass computes of a recorded request.

    Attributes:
        offset: where the request's tokens begin in the pass.
        first, stop: their positions in the request.
        pages: int64 physical pages of all its tokens so far.
    """

    document: Document
    offset: int
    first: int
    stop: int
    pages: torch.Tensor

    @property
    def observed(self) -> slice:
        """Those of the pass's tokens whose queries are kept."""
        return slice(self.offset + max(0, self.document.first - self.first), self.offset + self.stop - self.first)


@dataclass
class Document:
    """A request that is being recorded; tensors are on the device until it ends.

    Attributes:
        start: position of the first anchor: what follows it, block by block, is what is to be predicted.
        first: position of the first token whose queries are kept, before that.
        queries: per pass ``[tokens, layers, q_heads, head_dim]``.
        mass: ``[blocks, layers * q_heads, pages]`` float16, over all of the model's layers.
    """

    rid: str
    prompt_tokens: int
    start: int
    first: int
    mass: torch.Tensor
    tokens: int = 0
    queries: list[torch.Tensor] = field(default_factory=list)


class Recorder:
    """One per scheduler process that was started with ``--lsa-record``.

    Recorded requests read all of their pages, in place, and find no prefix in the radix tree.

    Args:
        folder: where recordings go, one file per request, named after it.
        layers: decoder layers whose queries and keys are kept.
        positions: recent positions that vote in the scores of training-free policies.
        layout: shows the model's keys.
        q_heads, softmax_scale: of the model.
        table: key bounds of every page, for the scores of quest; see ``PageKeys``.
        hidden_size: of the model.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        layers: Sequence[int],
        positions: int,
        layout: KVLayout,
        q_heads: int,
        softmax_scale: float,
        table: torch.Tensor,
        hidden_size: int,
    ):
        self.folder = pathlib.Path(folder)
        self.layers, self.positions, self.layout = tuple(layers), positions, layout
        self.q_heads, self.scale, self.table, self.hidden_size = q_heads, softmax_scale, table, hidden_size
        self.documents: dict[str, Document] = {}
        self.written = 0
        self.parts: list[Part] = []
        """What the pass being queued computes of recorded requests."""
        self._queries: dict[int, torch.Tensor] = {}

    # -- one forward pass ----------------------------------------------------------------------------------------

    def begin_pass(self, step: Step, v2p: np.ndarray) -> None:
        """A pass is about to be queued: see what it computes of recorded requests.

        Args:
            step: the pass.
            v2p: the ledger's map.
        """
        self._queries, self.parts = {}, []
        offset = 0
        for request, first, tokens in zip(step.requests, step.prefixes, step.lengths, strict=True):
            if request.asked.record and first == 0:
                self.documents[request.key] = self._open(request)
            if request.key in self.documents:
                places = v2p[request.pages[: pages_spanned(tokens, self.layout.page_tokens)]].astype(np.int64)
                pages = torch.from_numpy(places).to(self.table.device)
                self.parts.append(Part(self.documents[request.key], offset, first, tokens, pages))
            offset += tokens - first

    def _open(self, request: Request) -> Document:
        start = max(0, request.prompt_tokens - request.asked.record) // BLOCK * BLOCK
        total = request.prompt_tokens + request.new_tokens
        pages = pages_spanned(total, self.layout.page_tokens)
        shape = (-(-(total - start) // BLOCK), len(self.layout.by_layer) * self.q_heads, pages)
        mass = torch.zeros(shape, dtype=torch.float16, device=self.table.device)
        return Document(request.rid, request.prompt_tokens, start, max(0, start - RECORDED_POSITIONS), mass)

    def observe(self, layer: int, queries: torch.Tensor) -> None:
        """Attention of one layer is computed, and its keys are in the pool.

        Args:
            queries: ``[tokens, q_heads, head_dim]`` of the whole pass.
        """
        if layer in self.layers:
            self._queries[layer] = queries
        for part in self.parts:
            document = part.document
            begin = max(part.first, document.start)
            if begin >= part.stop:
                continue
            asked = queries[part.offset + begin - part.first : part.offset + part.stop - part.first]
            at = torch.arange(begin, part.stop, device=queries.device)
            keys = self.layout.keys_of((layer,), part.pages).flatten(0, 2)  # as they will be read, one after the other
            slots = torch.arange(part.stop, device=queries.device)
            mass = attention_mass(asked, keys, slots, at, self.scale, self.layout.page_tokens)
            rows = document.mass[:, layer * self.q_heads : (layer + 1) * self.q_heads, : mass.shape[2]]
            block = ((at - document.start) // BLOCK)[:, None, None].expand(mass.shape)
            rows.scatter_reduce_(0, block, mass.half(), "amax")

    def end_pass(self) -> None:
        """The pass is queued: keep the queries that it showed."""
        for part in self.parts:
            seen = [self._queries[layer][part.observed] for layer in self.layers]
            part.document.queries.append(torch.stack(seen, dim=1))
            part.document.tokens = part.stop
        self.parts = []

    # -- the end of a request ------------------------------------------------------------------------------------

    def close(self, request: Request, finished: bool, v2p: np.ndarray) -> None:
        """The request's KV is about to be released: write its recording, if it came to its end.

        Args:
            finished: it was neither aborted nor retracted.
            v2p: the ledger's map.
        """
        document = self.documents.pop(request.key, None)
        if document is None or not finished:
            return
        input_ids = torch.tensor(request.text(document.tokens), dtype=torch.int32)
        complete = len(input_ids)
        blocks = (complete - document.start) // BLOCK  # the last one may be cut: it is left out
        full = request.pages[: pages_complete(complete, self.layout.page_tokens)]
        if blocks <= 0 or not len(full):
            logger.warning("LSA: %s has only %d tokens and was not recorded", request.rid, complete)
            return
        virtual, physical = (torch.from_numpy(ids.astype(np.int64)).to(self.table.device) for ids in (full, v2p[full]))
        anchors = [document.start + BLOCK * block for block in range(blocks)]
        queries = torch.cat(document.queries)
        spanned = pages_spanned(complete, self.layout.page_tokens)
        tensors = {
            "input_ids": input_ids,
            "queries": queries[: complete - document.first],
            "runs": key_runs(self.layout.keys_of(self.layers, physical)).to(queries.dtype),
            "mass": document.mass[:blocks, :, :spanned],
            "quest": self._scores(document, queries, anchors, self.table[virtual]),
            "mean_key": self._scores(document, queries, anchors, self._mean_keys(physical)),
        }
        facts: dict[str, Any] = {
            "prompt_tokens": document.prompt_tokens,
            "tokens": complete,
            "start": document.start,
            "first": document.first,
            "layers": list(self.layers),
            "model_layers": len(self.layout.by_layer),
            "hidden_size": self.hidden_size,
            "q_heads": self.q_heads,
        }
        write_recording(self.folder / f"{request.rid}.safetensors", tensors, facts)
        self.written += 1

    def _scores(
        self, document: Document, queries: torch.Tensor, anchors: list[int], table: torch.Tensor
    ) -> torch.Tensor:
        """Scores at every anchor by the rows of ``table``, one a page; 0 for pages that were not complete then.

        Returns:
            float16 ``[anchors, pages]``.
        """
        scores = torch.zeros((len(anchors), len(table)), dtype=torch.float16, device=queries.device)
        for row, anchor in enumerate(anchors):
            stop = anchor - document.first
            recent = queries[max(0, stop - self.positions) : stop]
            known = torch.arange(pages_complete(anchor, self.layout.page_tokens), device=queries.device)
            if len(recent) and len(known):
                scores[row, : len(known)] = bound_score(recent, table, known, self.scale).half()
        return scores

    def _mean_keys(self, physical: torch.Tensor) -> torch.Tensor:
        """Of the form of key bounds, but both bounds of a page are its mean key."""
        means = self.layout.keys_of(self.layers, physical).float().mean(dim=1)
        return torch.stack((means, means), dim=2).to(self.layout.compute_dtype)
