"""page_score: how much the next tokens are expected to attend to each page, and how requests are scored together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

PAGES_AT_ONCE = 4096
"""Pages whose logits the torch reference holds in memory at a time."""
SPAN, ENDLESS = 5, 1 << 30
"""Numbers that say of a request what is scored; more pages than any has."""
PARTIAL_BYTES = 1 << 25
"""Device bytes of partial sums, or of projected queries, that one call keeps, but those of one request at least."""
BLOCKS_OF_TILE = 64
"""Blocks whose sums are added up at a time."""


@dataclass(frozen=True)
class Ragged:
    """Requests whose pages are scored by one call, however many each has.

    Attributes:
        known: int64 ``[requests, SPAN]`` on the host. Of each request its row in the ring of recent queries, the place
            of its first position there, its positions, where its pages begin in ``pages``, and how many it has.
        spans: the same numbers where the kernels run.
        pages: int64 ``[n]`` virtual ids of the pages of all requests, one after the other, where the kernels run.
    """

    known: torch.Tensor
    spans: torch.Tensor
    pages: torch.Tensor

    @classmethod
    def alone(cls, positions: int, pages: torch.Tensor) -> Ragged:
        """One request: the only row of a ring of just its positions."""
        known = torch.tensor([[0, 0, positions, 0, len(pages)]])
        spans = known.pin_memory().to(pages.device, non_blocking=True) if pages.is_cuda else known
        return cls(known, spans, pages)

    def __len__(self) -> int:
        return len(self.known)

    @property
    def sizes(self) -> list[int]:
        """Pages of each request."""
        return self.known[:, 4].tolist()

    def recent(self, ring: torch.Tensor, index: int) -> torch.Tensor:
        """What ``ring [rows, places, ...]`` has of one request, ``[positions, ...]`` in no particular order."""
        row, first, positions = self.known[index, :3].tolist()
        if positions == ring.shape[1]:
            return ring[row]
        return ring[row, torch.arange(first, first + positions, device=ring.device) % ring.shape[1]]

    def pages_of(self, index: int) -> torch.Tensor:
        """Virtual ids of the pages of one request."""
        start, count = self.known[index, 3:].tolist()
        return self.pages[start : start + count]

    def blocks(self, block_pages: int, least: int = 1, most: int = ENDLESS) -> int:
        """Blocks of the longest request that has between ``least`` and ``most`` pages."""
        return max((-(-n // block_pages) for n in self.sizes if least <= n <= most), default=0)

    def within(self, each: int) -> Iterator[Ragged]:
        """All requests in as few parts as the memory for partial results allows, mostly one, each with its own pages.

        Args:
            each: bytes of them that one request has.
        """
        step = max(1, PARTIAL_BYTES // max(1, each))
        if len(self) <= step:
            yield self
            return
        for first in range(0, len(self), step):
            known, spans = self.known[first : first + step].clone(), self.spans[first : first + step].clone()
            start, end = int(known[0, 3]), int(known[-1, 3:].sum())
            known[:, 3] -= start
            spans[:, 3] -= start
            yield Ragged(known, spans, self.pages[start:end])

    def parts(
        self, block_pages: int, block_bytes: int, least: int = 1, most: int = ENDLESS
    ) -> Iterator[tuple[int, int, Ragged]]:
        """All requests in as few parts as the memory for partial sums allows, mostly one.

        Args:
            block_bytes: of partial sums that a block of ``block_pages`` pages has.

        Returns:
            Of each part its first request, the blocks of its longest one, and the part; none without such a request.
        """
        blocks = self.blocks(block_pages, least, most)
        step = max(1, PARTIAL_BYTES // max(1, blocks * block_bytes))
        for first in range(0, len(self) if blocks else 0, step):
            part = slice(first, first + step)
            found = Ragged(self.known[part], self.spans[part], self.pages)
            if blocks := found.blocks(block_pages, least, most):
                yield first, blocks, found


def page_score(
    queries: torch.Tensor, table: torch.Tensor, pages: torch.Tensor, key_of_head: torch.Tensor, overlap: int = 0
) -> torch.Tensor:
    """The memory indexer's view of attention: the largest share that any recent position pays to each page, or to the
    text right before it.

    A page has a few keys, each from a run of its tokens. What a head pays is a softmax over the keys of all pages; a
    page gets the sum of its keys' shares, and the most that any position would pay it.

    Args:
        queries: ``[heads, positions, dim]``; the softmax scale is in them.
        table: uint8 ``[virtual_pages + 1, key_heads, sub_keys, dim]`` keys of every page, from :func:`to_8_bits`.
        pages: int64 ``[n]`` virtual ids of the request's pages, first to last.
        key_of_head: int64 ``[heads]``, which of the ``key_heads`` each head looks at.
        overlap: keys at the end of a page that are looked at for the page after it, too, which gets no less than they
            do: the text that follows them is there.

    Returns:
        ``[heads, n]`` float32 in [0, 1]; zeros when there are no positions.

    Raises:
        ValueError: queries and keys do not fit, keys are of another type, or a page has fewer than ``overlap``.
    """
    _fit(queries.shape, table, key_of_head, overlap)
    if not queries.shape[1] or not len(pages):
        return torch.zeros((len(queries), len(pages)), dtype=torch.float32, device=table.device)
    score = _page_score_triton if table.is_cuda else page_score_reference
    return score(queries, table, pages, key_of_head, overlap)


def page_score_reference(queries, table, pages, key_of_head, overlap=0) -> torch.Tensor:
    """See :func:`page_score`. Two passes over the pages, so that memory does not grow with the context."""
    blocks = pages.split(PAGES_AT_ONCE)

    def logits(block: torch.Tensor) -> torch.Tensor:
        keys = from_8_bits(table[block])[:, key_of_head]  # [n, heads, sub_keys, dim]
        return torch.einsum("htd,nhsd->htns", queries.float(), keys)

    if len(blocks) == 1:
        return attention_shares(logits(pages), overlap)
    normaliser = torch.stack([logits(block).logsumexp(dim=(2, 3)) for block in blocks]).logsumexp(dim=0)
    own, ends = [], []
    for block in blocks:
        shares = (logits(block) - normaliser[..., None, None]).exp()
        own.append(_most_of_any_position(shares))
        ends.append(_most_of_any_position(_ends(shares, overlap)))
    return _overlapping(torch.cat(own, dim=1), torch.cat(ends, dim=1))


def to_8_bits(keys: torch.Tensor) -> torch.Tensor:
    """Numbers as bytes: fp8 (e4m3), which keeps three digits of the binary mantissa between 2^-6 and 448."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return keys.float().clamp(-most, most).to(torch.float8_e4m3fn).view(torch.uint8)


def from_8_bits(numbers: torch.Tensor) -> torch.Tensor:
    """The numbers that :func:`to_8_bits` made bytes of, float32."""
    return numbers.view(torch.float8_e4m3fn).float()


@triton.jit
def from_8_bits_kernel(
    bits,  # int32, each a byte of to_8_bits
):
    """:func:`from_8_bits` in a kernel, by hand, which every device and the interpreter can do."""
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).to(tl.float32)
    size = tl.where(exponent == 0, mantissa, (mantissa + 8) * tl.exp2((exponent - 1).to(tl.float32))) * 0.001953125
    return tl.where((bits & 128) != 0, -size, size)


def attention_shares(logits: torch.Tensor, overlap: int = 0) -> torch.Tensor:
    """``[heads, positions, pages, sub_keys]`` -> the largest share of any position, ``[heads, pages]``, where pages
    follow each other; see :func:`page_score`."""
    shares = logits.flatten(2).softmax(dim=-1).view_as(logits)
    own = _most_of_any_position(shares)
    return _overlapping(own, _most_of_any_position(_ends(shares, overlap)))


def _ends(shares: torch.Tensor, overlap: int) -> torch.Tensor:
    """Of ``[heads, positions, pages, sub_keys]`` the last ones of each page; of none the sum is 0."""
    return shares[..., shares.shape[3] - overlap :]


def _most_of_any_position(shares: torch.Tensor) -> torch.Tensor:
    return shares.sum(dim=-1).amax(dim=1)


def _overlapping(own: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Of ``[heads, pages]`` each the larger of its own and what the end of the page before it has."""
    return torch.maximum(own, pad(ends[:, :-1], (1, 0)))


def page_scores(
    queries: torch.Tensor, table: torch.Tensor, asked: Ragged, key_of_head: torch.Tensor, overlap: int = 0
) -> torch.Tensor:
    """:func:`page_score` of several requests in one call: each gets the shares that it would get alone, bit for bit.

    Args:
        queries: ``[requests, heads, places, dim]``; of each request its positions, and whatever after them.
        table, key_of_head, overlap: as for :func:`page_score`.
        asked: the requests, their positions and their pages.

    Returns:
        ``[heads, pages]`` float32 in [0, 1], one request after the other.

    Raises:
        ValueError: as from :func:`page_score`.
    """
    _fit(queries.shape[1:], table, key_of_head, overlap)
    if not queries.shape[2] or not len(asked.pages):
        return torch.zeros((queries.shape[1], len(asked.pages)), dtype=torch.float32, device=table.device)
    scores = _page_scores_triton if table.is_cuda else page_scores_reference
    return scores(queries, table, asked, key_of_head, overlap)


def page_scores_reference(queries, table, asked, key_of_head, overlap=0) -> torch.Tensor:
    """See :func:`page_scores`."""
    positions = asked.known[:, 2].tolist()
    own = [queries[i, :, :count].contiguous() for i, count in enumerate(positions)]
    return torch.cat([page_score(q, table, asked.pages_of(i), key_of_head, overlap) for i, q in enumerate(own)], dim=1)


def _fit(queries: torch.Size, table: torch.Tensor, key_of_head: torch.Tensor, overlap: int) -> None:
    if table.dtype != torch.uint8:
        raise ValueError(f"page keys are {table.dtype}: use what to_8_bits returns")
    if queries[-1] != table.shape[-1] or queries[0] != len(key_of_head):
        raise ValueError(
            f"queries {tuple(queries)} of {len(key_of_head)} heads do not fit page keys {tuple(table.shape)}"
        )
    if not 0 <= overlap <= table.shape[2]:
        raise ValueError(f"overlap {overlap} is out of range: use 0 to {table.shape[2]}, the keys of a page")


def _page_score_triton(queries, table, pages, key_of_head, overlap=0) -> torch.Tensor:
    return _page_scores_triton(queries[None], table, Ragged.alone(queries.shape[1], pages), key_of_head, overlap)


def _page_scores_triton(queries, table, asked, key_of_head, overlap=0) -> torch.Tensor:
    _, heads, places, dim = queries.shape
    _, key_heads, sub_keys, _ = table.shape
    total = len(asked.pages)
    queries = queries.contiguous()
    block_voters = max(16, min(64, triton.next_power_of_2(places)))
    voter_blocks = triton.cdiv(places, block_voters)
    voters = voter_blocks * block_voters
    block_pages = max(1, 128 // sub_keys)
    shares = torch.zeros((heads, total), dtype=torch.float32, device=table.device)
    for first, blocks, part in asked.parts(block_pages, heads * voters * 4):
        partial = torch.empty((len(part), heads, blocks, voters), dtype=torch.float32, device=table.device)
        sums = torch.empty((len(part), heads, voters), dtype=torch.float32, device=table.device)
        for last in (False, True):
            _page_score_kernel[(blocks, heads, len(part) * voter_blocks)](
                queries,
                first,
                table,
                part.pages,
                part.spans,
                key_of_head,
                sums if last else partial,
                shares,
                total,
                blocks,
                PLACES=places,
                KEY_HEADS=key_heads,
                SUB_KEYS=sub_keys,
                DIM=dim,
                VOTERS=voters,
                BLOCK_VOTERS=block_voters,
                BLOCK_PAGES=block_pages,
                BLOCK_DIM=max(16, triton.next_power_of_2(dim)),
                SPAN=SPAN,
                OVERLAP=overlap,
                LAST=last,
            )
            if not last:
                _normalise_kernel[(len(part), heads, voter_blocks)](
                    partial,
                    part.spans,
                    sums,
                    blocks,
                    VOTERS=voters,
                    BLOCK_VOTERS=block_voters,
                    BLOCK_PAGES=block_pages,
                    TILE=BLOCKS_OF_TILE,
                    SPAN=SPAN,
                )
    return shares


@triton.jit(do_not_specialize=["most_blocks"], do_not_specialize_on_alignment=["spans"])
def _normalise_kernel(
    partial,  # float32 log-sum-exp of each block [requests, heads, most_blocks, VOTERS]
    spans,  # int64 [requests, SPAN]
    sums,  # float32 log-sum-exp of all pages [requests, heads, VOTERS]
    most_blocks,
    VOTERS: tl.constexpr,
    BLOCK_VOTERS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """By hand, tile after tile of blocks: torch sums in an order that depends on what is summed beside."""
    request = tl.program_id(0).to(tl.int64)
    at = request * tl.num_programs(1) + tl.program_id(1)
    blocks = (tl.load(spans + request * SPAN + 4) + BLOCK_PAGES - 1) // BLOCK_PAGES
    if blocks == 0:
        return
    voter = tl.program_id(2) * BLOCK_VOTERS + tl.arange(0, BLOCK_VOTERS)
    own = partial + at * most_blocks * VOTERS + voter
    most = tl.full((BLOCK_VOTERS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_VOTERS,), tl.float32)
    for first in range(0, blocks, TILE):
        block = first + tl.arange(0, TILE)
        value = tl.load(own[None, :] + block[:, None] * VOTERS, mask=(block < blocks)[:, None], other=float("-inf"))
        higher = tl.maximum(most, tl.max(value, axis=0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(value - higher[None, :]), axis=0)
        most = higher
    tl.store(sums + at * VOTERS + voter, most + tl.log(total))


@triton.jit(do_not_specialize=["first", "total", "most_blocks"], do_not_specialize_on_alignment=["pages", "spans"])
def _page_score_kernel(
    queries,  # [requests, heads, PLACES, DIM]
    first,  # of them, which spans and sums begin with
    table,  # uint8 [virtual_pages + 1, KEY_HEADS, SUB_KEYS, DIM]
    pages,  # int64 [total], of all requests
    spans,  # int64 [requests, SPAN] of Ragged
    key_of_head,  # int64 [heads]
    sums,  # float32 log-sum-exp of each block [requests, heads, most_blocks, VOTERS]; LAST: of all, without most_blocks
    shares,  # float32 [heads, total], zeros at first
    total,
    most_blocks,
    PLACES: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SUB_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VOTERS: tl.constexpr,
    BLOCK_VOTERS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPAN: tl.constexpr,
    OVERLAP: tl.constexpr,
    LAST: tl.constexpr,  # first launch: what a softmax over pages needs; second: the shares
):
    block = tl.program_id(0)
    head = tl.program_id(1)
    request = (tl.program_id(2) // (VOTERS // BLOCK_VOTERS)).to(tl.int64)
    positions = tl.load(spans + request * SPAN + 2)
    start, n = tl.load(spans + request * SPAN + 3), tl.load(spans + request * SPAN + 4)
    if block * BLOCK_PAGES >= n:
        return
    voter = tl.program_id(2) % (VOTERS // BLOCK_VOTERS) * BLOCK_VOTERS + tl.arange(0, BLOCK_VOTERS)
    of_head = request * tl.num_programs(1) + head
    key = tl.arange(0, BLOCK_PAGES * SUB_KEYS)
    index = block * BLOCK_PAGES + key // SUB_KEYS
    d = tl.arange(0, BLOCK_DIM)
    of_query = (first + request) * tl.num_programs(1) + head
    q_at = queries + (of_query * PLACES + voter)[:, None] * DIM + d[None, :]
    q = tl.load(q_at, mask=(voter < positions)[:, None] & (d < DIM)[None, :], other=0.0)
    page = tl.load(pages + start + index, mask=index < n, other=0)
    row = (page * KEY_HEADS + tl.load(key_of_head + head)) * SUB_KEYS + key % SUB_KEYS
    real = (index < n)[None, :] & (d < DIM)[:, None]
    bits = tl.load(table + row[None, :] * DIM + d[:, None], mask=real, other=0).to(tl.int32)
    logits = tl.dot(q, from_8_bits_kernel(bits).to(q.dtype), input_precision="ieee")
    logits = tl.where((index < n)[None, :], logits, float("-inf"))  # [BLOCK_VOTERS, BLOCK_PAGES * SUB_KEYS]
    if LAST:
        share = tl.exp(logits - tl.load(sums + of_head * VOTERS + voter)[:, None])
        share = tl.where((voter < positions)[:, None], share, 0.0)
        at = block * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
        of_page = shares + head.to(tl.int64) * total + start + at
        own = tl.sum(tl.reshape(share, (BLOCK_VOTERS, BLOCK_PAGES, SUB_KEYS)), axis=2)
        tl.atomic_max(of_page, tl.max(own, axis=0), mask=at < n)
        if OVERLAP:
            ends = tl.where((key % SUB_KEYS >= SUB_KEYS - OVERLAP)[None, :], share, 0.0)
            ends = tl.sum(tl.reshape(ends, (BLOCK_VOTERS, BLOCK_PAGES, SUB_KEYS)), axis=2)
            tl.atomic_max(of_page + 1, tl.max(ends, axis=0), mask=at + 1 < n)
    else:
        most = tl.max(logits, axis=1)
        summed = tl.sum(tl.exp(logits - most[:, None]), axis=1)
        tl.store(sums + (of_head * most_blocks + block) * VOTERS + voter, most + tl.log(summed))
