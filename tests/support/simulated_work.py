"""What the simulated scheduler hands around: requests, their KV, and the forward passes that read and write it.

KV is the number of a (text, position), so that a pass sees what it reads instead of what it should.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from release import OfEveryRelease
from simulated_cache import Node, keys_of
from simulated_gpu import LAYERS

from sglang_lsa.kernels.retriever_score_paged import VALUES
from sglang_lsa.memory.layout.base import Piece
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_complete, pages_spanned

LONGEST_ANSWER = 1024
"""Tokens that a request generates at most."""
Watch = Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]
"""Is told a layer and the row, position and content of every token that it computes."""
UNWRITTEN = -1.0
"""In the place of tokens that a page does not have yet."""
KV = torch.float64
"""Type of a token's key, and of its value; there is one of each."""


@dataclass(eq=False)
class Req(OfEveryRelease):
    """SGLang's request, as far as our code reads it, and what the simulated scheduler remembers of it."""

    rid: str
    number: int
    page: int
    """Tokens of a page."""
    prompt: np.ndarray
    """Content of its prompt, one number a token; fixed before anybody asks for its text."""
    sampling_params: SimpleNamespace
    priority: int = 0
    origin_input_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    full_untruncated_fill_ids: list[int] = field(default_factory=list)
    prefix_indices: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    req_pool_idx: int = 0
    extra_key: str | None = None
    kv_committed_len: int = 0
    pages: list[int] = field(default_factory=list)
    matched: list[Node] = field(default_factory=list)
    locked: Node | None = None
    protected: int = 0
    """Its first pages that are the tree's."""
    gone: bool = False
    """Finished, aborted or retracted: what is in flight of it does not count."""
    aborted: bool = False
    between_chunks: bool = False

    def finished(self) -> bool:
        return False  # nothing is recorded here

    @functools.cached_property
    def text(self) -> np.ndarray:
        """Content of its pages, ``[pages, page]``, with all that it will ever generate."""
        generated = 1e12 + self.number * 1e6 + np.arange(len(self.prompt), len(self.prompt) + LONGEST_ANSWER)
        whole = np.concatenate((self.prompt, generated))
        return whole[: len(whole) // self.page * self.page].reshape(-1, self.page)

    @functools.cached_property
    def _keys(self) -> list[int]:
        return keys_of(self.text)

    def keys(self, tokens: int) -> list[int]:
        """By what the radix tree knows the complete pages of its first tokens."""
        return self._keys[: pages_complete(tokens, self.page)]

    def known(self, positions: np.ndarray, tokens: int) -> np.ndarray:
        """Content of these pages, in ascending order, when it has ``tokens`` tokens: ``[pages, page]``."""
        found = self.text[positions]
        if len(positions) and (positions[-1] + 1) * self.page > tokens:
            found[-1, tokens % self.page :] = UNWRITTEN
        return found

    @property
    def page_array(self) -> np.ndarray:
        """Its virtual pages, int64."""
        return np.array(self.pages, dtype=np.int64)


@dataclass
class Entry:
    """A prompt's part of a pass."""

    req: Req
    start: int
    end: int


@dataclass
class Part:
    """One piece of a layer.

    Attributes:
        device, mirror: ``[pages, page, ...]``.
        encode: what a token's content looks like in it.
    """

    device: np.ndarray
    mirror: np.ndarray
    encode: Callable[[np.ndarray], np.ndarray]


class Memory:
    """The device pool and the mirror of a pager, as numpy sees them.

    Attributes:
        parts: by layer. The second one has index keys where the model has an index of its own; all else is numbers.
        watch: what sees each pass as it runs, if anything.
    """

    def __init__(self, pager: Pager):
        self.v2p, self.page = pager.ledger.v2p, pager.page
        self.watch: Watch | None = None
        self.parts = [
            [
                self._part(piece, pager.mirror.pages, place == 1 and not pager.layout.shows_keys)
                for place, piece in enumerate(pager.layout.by_layer[layer])
            ]
            for layer in range(LAYERS)
        ]

    def _part(self, piece: Piece, mirror: torch.Tensor, index: bool) -> Part:
        rows = piece.buffer, mirror[:, piece.offset : piece.offset + piece.nbytes]
        if index:
            return Part(*(row[:, :VALUES].unflatten(1, (self.page, -1)).numpy() for row in rows), index_key)
        return Part(*(row[:, : self.page * KV.itemsize].view(KV).numpy() for row in rows), lambda content: content)


class Reads:
    """What the requests of a pass read of one memory, and must find there."""

    def __init__(self) -> None:
        self._of: list[tuple[str, np.ndarray, np.ndarray]] = []

    def add(self, rid: str, pages: np.ndarray, content: np.ndarray) -> None:
        """These pages of the memory hold ``content``, as of :meth:`Req.known`."""
        self._of.append((rid, pages, content))

    @functools.cached_property
    def _together(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pages, content, and which of it is written, of all requests at once and for all layers."""
        content = np.concatenate([content for _, _, content in self._of])
        return np.concatenate([pages for _, pages, _ in self._of]), content, content != UNWRITTEN

    def check(self, memory: np.ndarray, encode: Callable[[np.ndarray], np.ndarray], what: str) -> None:
        """Read ``memory``, ``[pages, page, ...]``, now.

        Raises:
            AssertionError: a request reads something else than its own tokens.
        """
        if not self._of:
            return
        pages, content, written = self._together
        found = memory[pages]
        wrong = found != encode(content)
        wrong = (wrong.any(axis=2) if wrong.ndim > 2 else wrong) & written
        if wrong.any():
            row, token = np.argwhere(wrong)[0]
            rids = [rid for rid, of, _ in self._of for _ in of]
            raise AssertionError(
                f"{rids[row]} reads {found[row, token]} for {content[row, token]:.0f} in {what}; "
                f"its pass reads {wrong.sum()} of {written.sum()} tokens wrong"
            )


class ForwardPass:
    """What a pass reads, must find, and writes; device pages as they are when it is queued, content when it runs."""

    def __init__(self, memory: Memory):
        self.v2p, self.memory = memory.v2p, memory
        self._here, self._streamed = Reads(), Reads()
        self._slots: list[np.ndarray] = []
        self._content: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []

    def read(self, rid: str, places: np.ndarray, content: np.ndarray) -> None:
        """These device pages."""
        assert places.all(), f"{rid} reads a page that is not on the device"
        self._here.add(rid, places, content)

    def stream(self, rid: str, pages: np.ndarray, content: np.ndarray) -> None:
        """These pages of the mirror."""
        self._streamed.add(rid, pages, content)

    def write(self, req: Req, start: int, end: int) -> None:
        """The tokens that the pass computes."""
        first, page = pages_complete(start, req.page), req.page
        places = self.v2p[np.array(req.pages[first : pages_spanned(end, page)], dtype=np.int64)]
        assert places.all(), f"{req.rid} writes to a page that is not on the device"
        tokens = slice(start - first * page, end - first * page)
        self._slots.append(slots_of(places, page)[tokens])
        self._content.append(req.text[first : pages_spanned(end, page)].reshape(-1)[tokens])
        self._rows.append(np.full(end - start, req.req_pool_idx))
        self._positions.append(np.arange(start, end))

    @functools.cached_property
    def _written(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self._slots), np.concatenate(self._content)

    def run(self, layer: int) -> None:
        """One layer runs now.

        Raises:
            AssertionError: a request reads something else than its own tokens.
        """
        slots, content = self._written
        for part in self.memory.parts[layer]:
            self._here.check(part.device, part.encode, f"layer {layer}")
            self._streamed.check(part.mirror, part.encode, f"layer {layer} of the mirror")
            part.device[slots // self.memory.page, slots % self.memory.page] = part.encode(content)
        if self.memory.watch is not None:
            self.memory.watch(layer, np.concatenate(self._rows), np.concatenate(self._positions), content)


def index_key(content: np.ndarray) -> np.ndarray:
    """A token's part of a key of a model's own index: 32 numbers in fp8, ``[..., 32]`` for content ``[...]``."""
    return ((content[..., None].astype(np.int64) + 7 * np.arange(32)) * 31 % 120).astype(np.uint8)


def slots_of(pages: Sequence[int] | np.ndarray, page: int) -> np.ndarray:
    """Of the tokens of these pages."""
    return (np.array(pages, dtype=np.int64)[:, None] * page + np.arange(page)).reshape(-1)
