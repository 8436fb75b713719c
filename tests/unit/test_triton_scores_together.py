"""Scores of several requests at once: Triton against its torch references; see ``triton_cases``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from triton_cases import DEVICE, NAN, SCORE_DTYPES, assert_same, crossed, ids, random, some

from sglang_lsa.kernels.bound_score import (
    _bound_scores_triton,
    bound_scores_reference,
)
from sglang_lsa.kernels.page_score import (
    Ragged,
    _page_scores_triton,
    page_score_reference,
    to_8_bits,
)
from sglang_lsa.kernels.project_queries import _project_queries_triton, project_queries_reference
from sglang_lsa.kernels.weigh_heads import _weigh_heads_triton, weigh_heads_reference

PLACES = 12
"""Of the ring of each request."""
TOGETHER = [
    # (row, first place, positions, pages) of each request
    pytest.param([(1, 0, PLACES, 70)], id="1 request"),
    pytest.param([(3, 0, PLACES, 9), (1, 0, PLACES, 130), (2, 0, PLACES, 64)], id="3 lengths"),
    pytest.param([(2, 7, 9, 5), (1, 11, 2, 90), (3, 0, PLACES, 33)], id="parts of rings, over their end"),
    pytest.param([(1, 0, PLACES, 0), (2, 3, 0, 10), (3, 0, PLACES, 65)], id="no pages, no positions"),
    pytest.param([(row % 4, 0, PLACES, 1 + 11 * row % 40) for row in range(7)], id="7 requests"),
]


def together(requests: Sequence[tuple[int, int, int, int]]) -> tuple[Ragged, list[Ragged]]:
    """Requests over some pages of 200, and each of them alone."""
    spans, pages = [], []
    for number, (row, first, positions, count) in enumerate(requests):
        spans.append([row, first, positions, len(pages), count])
        pages += some(count, 200, seed=number)
    known = torch.tensor(spans)
    every = Ragged(known, known.to(DEVICE), ids(pages))
    alone = []
    for index, (row, first, positions, count) in enumerate(requests):
        own = torch.tensor([[row, first, positions, 0, count]])
        alone.append(Ragged(own, own.to(DEVICE), every.pages_of(index)))
    return every, alone


EDGES = ("3 lengths", "no pages, no positions")
CALLS = [pytest.param(1 << 25, id="1 call"), pytest.param(1, id="a call for each")]
"""Bytes that the blocks of one call may take."""
BLOCKS = [pytest.param(8192, id="small blocks"), pytest.param(60, id="small and large blocks")]


@pytest.mark.parametrize(("requests", "call", "many"), crossed(TOGETHER, CALLS, BLOCKS, edges=EDGES))
def test_bound_scores(
    requests: Sequence[tuple[int, int, int, int]], call: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a bit depends on who else is scored."""
    monkeypatch.setattr("sglang_lsa.kernels.page_score.PARTIAL_BYTES", call)
    monkeypatch.setattr("sglang_lsa.kernels.bound_score.MANY_PAGES", many)
    ring, table = random(4, PLACES, 2, 6, 16), random(201, 2, 2, 2, 16, seed=1).sort(dim=2).values.contiguous()
    every, alone = together(requests)
    scores = _bound_scores_triton(ring, table, every, 0.25)
    torch.testing.assert_close(scores, bound_scores_reference(ring, table, every, 0.25), rtol=0, atol=1e-5)
    assert_same(scores, torch.cat([_bound_scores_triton(ring, table, one, 0.25) for one in alone]))


KEYS = [
    pytest.param((8, 0), id="8 keys a page"),
    pytest.param((8, 3), id="8 keys a page, 3 for the next"),
    pytest.param((1, 1), id="1 key a page, for the next too"),
]


@pytest.mark.parametrize(("requests", "call", "keys"), crossed(TOGETHER, CALLS, KEYS, edges=EDGES))
def test_page_scores(
    requests: Sequence[tuple[int, int, int, int]], call: int, keys: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a bit depends on who else is scored, nor what lies behind a request's positions, or before its pages."""
    sub_keys, overlap = keys
    monkeypatch.setattr("sglang_lsa.kernels.page_score.PARTIAL_BYTES", call)
    table = to_8_bits(random(201, 2, sub_keys, 16, seed=1))
    heads = ids([0, 1, 1])
    queries = random(len(requests), 3, PLACES, 16) * 0.5
    every, alone = together(requests)
    for index, (_, _, positions, _) in enumerate(requests):
        queries[index, :, positions:] = NAN
    shares = _page_scores_triton(queries, table, every, heads, overlap)
    expected = [
        page_score_reference(queries[index, :, :positions], table, one.pages, heads, overlap)
        if positions and len(one.pages)
        else torch.zeros(3, len(one.pages), device=DEVICE)
        for index, ((_, _, positions, _), one) in enumerate(zip(requests, alone, strict=True))
    ]
    torch.testing.assert_close(shares, torch.cat(expected, dim=1), rtol=0, atol=1e-5)
    own = [_page_scores_triton(queries[i : i + 1], table, one, heads, overlap) for i, one in enumerate(alone)]
    assert_same(shares, torch.cat(own, dim=1))


@pytest.mark.parametrize("requests", TOGETHER)
@pytest.mark.parametrize(("head_dim", "dim"), [(16, 16), (80, 8)], ids=["16 to 16", "80 to 8"])
@pytest.mark.parametrize("dtype", SCORE_DTYPES)
def test_project_queries(
    requests: Sequence[tuple[int, int, int, int]], head_dim: int, dim: int, dtype: torch.dtype
) -> None:
    ring = random(4, PLACES, 2, 3, head_dim, dtype=dtype)
    given = ids([5, 0]), random(2, head_dim, dim, seed=1)
    every, alone = together(requests)
    found, expected = _project_queries_triton(ring, every, *given), project_queries_reference(ring, every, *given)
    for index, (_, _, positions, _) in enumerate(requests):
        own = found[index, :, :positions]
        torch.testing.assert_close(own, expected[index, :, :positions], rtol=1e-5, atol=1e-4)
        assert_same(own, _project_queries_triton(ring, alone[index], *given)[0, :, :positions])


@pytest.mark.parametrize("requests", TOGETHER)
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_requests_in_parts(
    requests: Sequence[tuple[int, int, int, int]], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as their memory allows; each gets what it gets among all, bit for bit."""
    ring, heads, tower = random(4, PLACES, 2, 3, 16), ids([5, 0]), random(2, 16, 16, seed=1)
    table, key_of_head = to_8_bits(random(201, 2, 4, 16, seed=2)), ids([0, 1])
    every, _ = together(requests)

    def shares(asked: Ragged) -> torch.Tensor:
        return _page_scores_triton(_project_queries_triton(ring, asked, heads, tower), table, asked, key_of_head)

    expected = shares(every)
    monkeypatch.setattr("sglang_lsa.kernels.page_score.PARTIAL_BYTES", 1000 * at_once + 999)
    parts = list(every.within(1000))
    assert [len(part) for part in parts[:-1]] == [at_once] * (len(parts) - 1) and len(parts[-1]) <= at_once
    assert sum(map(len, parts)) == len(every)
    assert_same(torch.cat([part.pages for part in parts]), every.pages)
    assert all(sum(part.sizes) == len(part.pages) for part in parts)
    assert_same(torch.cat([shares(part) for part in parts], dim=1), expected)


@pytest.mark.parametrize(("heads", "pages"), [(1, 1), (8, 700), (3, 0)])
def test_weigh_heads(heads: int, pages: int) -> None:
    shares, weights = random(heads, pages), random(heads, seed=1)
    found = _weigh_heads_triton(shares, weights, 1.5)
    torch.testing.assert_close(found, weigh_heads_reference(shares, weights, 1.5), rtol=0, atol=1e-5)
    assert_same(found[:5], _weigh_heads_triton(shares[:, :5], weights, 1.5))
