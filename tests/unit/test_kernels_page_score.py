"""Scores of pages against naive loops in float64, over shapes and types; and that Quest's bound is one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, NAN, TOLERANCE, random

from sglang_lsa.kernels import bound_score as bound_score_module
from sglang_lsa.kernels import page_score
from sglang_lsa.kernels.bound_score import bound_score
from sglang_lsa.kernels.page_keys import key_bounds


def naive_bound_score(queries: torch.Tensor, bounds: torch.Tensor, scale: float) -> list[float]:
    positions, layers, q_heads, dim = queries.shape
    pages, _, _, kv_heads, _ = bounds.shape
    q, b = queries.double().tolist(), bounds.double().tolist()
    best = [0.0] * pages
    for t in range(positions):
        for layer in range(layers):
            for head in range(q_heads):
                kv = head // (q_heads // kv_heads)
                logits = []
                for page in range(pages):
                    low, high = b[page][layer][0][kv], b[page][layer][1][kv]
                    x = q[t][layer][head]
                    logits.append(scale * sum(max(x[d] * low[d], x[d] * high[d]) for d in range(dim)))
                total = math.fsum(math.exp(logit - max(logits)) for logit in logits)
                for page in range(pages):
                    best[page] = max(best[page], math.exp(logits[page] - max(logits)) / total)
    return best


def scattered(bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table of more pages with these bounds at random places, NaN elsewhere; and the places."""
    pages = len(bounds)
    places = 1 + torch.randperm(2 * pages, generator=torch.Generator().manual_seed(3))[:pages]
    table = torch.full((2 * pages + 1, *bounds.shape[1:]), NAN, dtype=bounds.dtype)
    table[places] = bounds
    return table, places


SCORES = [
    # positions, layers, pages, kv_heads, group, head_dim
    pytest.param(2, 2, 0, 2, 1, 8, id="0 pages"),
    pytest.param(2, 2, 1, 2, 1, 8, id="1 page"),
    pytest.param(0, 2, 3, 2, 1, 8, id="0 positions"),
    pytest.param(1, 1, 2, 1, 1, 1, id="smallest"),
    pytest.param(2, 2, 9, 2, 1, 80, id="head_dim 80"),
    pytest.param(2, 1, 9, 3, 3, 16, id="groups of 3"),
    pytest.param(2, 2, 9, 1, 8, 16, id="groups of 8"),
    pytest.param(5, 4, 17, 2, 2, 8, id="5 positions, 4 layers"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("positions", "layers", "pages", "kv_heads", "group", "dim"), SCORES)
def test_bound_score(
    positions: int, layers: int, pages: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype
) -> None:
    queries = random(positions, layers, kv_heads * group, dim, dtype=dtype, seed=1)
    keys = random(pages, layers, 6, kv_heads, dim, dtype=dtype, seed=2)
    bounds = torch.stack((keys.amin(dim=2), keys.amax(dim=2)), dim=2)
    table, ids = scattered(bounds)
    scores = bound_score(queries, table, ids, dim**-0.5)
    assert scores.shape == (pages,)
    assert scores.dtype == torch.float32
    expected = torch.tensor(naive_bound_score(queries, bounds, dim**-0.5), dtype=torch.float64)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_many_pages_are_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the pages are cut, and if a piece has but one."""
    queries = random(3, 2, 4, 8, seed=1)
    keys = random(17, 2, 6, 2, 8, seed=2)
    table, ids = scattered(torch.stack((keys.amin(dim=2), keys.amax(dim=2)), dim=2))
    whole = bound_score(queries, table, ids, 0.5)
    for at_once in (1, 4, 16, 17):
        monkeypatch.setattr(bound_score_module, "PAGES_AT_ONCE", at_once)
        torch.testing.assert_close(bound_score(queries, table, ids, 0.5), whole, rtol=0, atol=1e-6)


def test_one_vote_is_enough() -> None:
    """One head at one position finds the page; an average over heads would hide it."""
    bounds = torch.zeros(8, 2, 2, 2, 4)
    bounds[5, 1, 1, 1, 3] = 1.0
    queries = torch.zeros(6, 2, 4, 4)
    queries[2, 1, 3, 3] = 50.0
    scores = bound_score(queries, bounds, torch.arange(8), 1.0)
    assert int(scores.argmax()) == 5
    assert scores[5] > 0.99
    assert scores[[0, 1, 2, 3, 4, 6, 7]].max() == pytest.approx(1 / 8)


def test_large_logits_do_not_overflow() -> None:
    queries, bounds = torch.full((1, 1, 1, 4), 3e4), torch.full((3, 1, 2, 1, 4), 3e4)
    assert bound_score(queries, bounds, torch.arange(3), 1.0).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("queries", "bounds"),
    [
        pytest.param((2, 2, 4, 8), (3, 2, 2, 3, 8), id="4 query heads over 3"),
        pytest.param((2, 2, 4, 8), (3, 1, 2, 2, 8), id="other layers"),
        pytest.param((2, 2, 4, 8), (3, 2, 2, 2, 16), id="other head_dim"),
    ],
)
def test_bound_score_refuses_what_does_not_fit(queries: tuple[int, ...], bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"queries \(2, 2, 4, 8\) do not fit key bounds \(3, "):
        bound_score(torch.zeros(queries), torch.zeros(bounds), torch.arange(3), 1.0)


@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_a_page_gets_the_largest_share_of_any_position(overlap: int) -> None:
    """By the definition, head by head and position by position, in float64; of its own keys together or, if that is
    more, of the last ones of the page before."""
    queries, numbers = random(3, 5, 8, seed=1), page_score.to_8_bits(random(7, 2, 4, 8, seed=2))
    table, ids = scattered(numbers.view(torch.float8_e4m3fn).half())
    table = page_score.to_8_bits(table)  # not a number where there is no page
    keys = page_score.from_8_bits(numbers)
    of_head = torch.tensor([1, 0, 1])
    shares = page_score.page_score(queries, table, ids, of_head, overlap)
    assert shares.shape == (3, 7)
    for head in range(3):
        flat = keys[:, of_head[head]].reshape(28, 8).double()
        attention = torch.stack([(flat @ queries[head, t].double()).softmax(0) for t in range(5)])
        of_keys = attention.view(5, 7, 4)
        expected = of_keys.sum(2).amax(0)
        if overlap:
            expected[1:] = expected[1:].maximum(of_keys[:, :-1, 4 - overlap :].sum(2).amax(0))
        torch.testing.assert_close(shares[head].double(), expected, rtol=0, atol=1e-6)


def test_text_across_two_pages_is_found_from_its_beginning() -> None:
    """A head looks for what the last tokens of page 2 say; what follows them is on page 3, at whose own keys none
    looks. Where the keys are not the last, it is on page 2."""
    keys = torch.zeros(6, 1, 8, 4)
    keys[2, 0, 7, 1] = 8.0
    queries, heads = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), torch.tensor([0])
    for overlap, expected in ((0, [2]), (2, [2, 3])):
        shares = page_score.page_score(queries, page_score.to_8_bits(keys), torch.arange(6), heads, overlap)[0]
        assert torch.nonzero(shares > 0.9).flatten().tolist() == expected
    keys = keys.roll(-4, dims=2)
    shares = page_score.page_score(queries, page_score.to_8_bits(keys), torch.arange(6), heads, 2)[0]
    assert torch.nonzero(shares > 0.9).flatten().tolist() == [2]


@pytest.mark.parametrize("overlap", [0, 2])
def test_shares_of_many_pages_are_found_in_pieces(overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = random(2, 3, 8, seed=1)
    table, ids = scattered(random(17, 1, 4, 8, seed=2))
    table = page_score.to_8_bits(table)
    of_head = torch.zeros(2, dtype=torch.int64)
    whole = page_score.page_score(queries, table, ids, of_head, overlap)
    for at_once in (1, 4, 16, 17):
        monkeypatch.setattr(page_score, "PAGES_AT_ONCE", at_once)
        shares = page_score.page_score(queries, table, ids, of_head, overlap)
        torch.testing.assert_close(shares, whole, rtol=0, atol=1e-6)


def test_no_positions_and_no_pages_have_no_shares() -> None:
    table, heads = torch.zeros(5, 1, 4, 8, dtype=torch.uint8), torch.tensor([0, 0])
    assert page_score.page_score(torch.zeros(2, 0, 8), table, torch.arange(3), heads).tolist() == [[0.0] * 3] * 2
    assert page_score.page_score(torch.zeros(2, 3, 8), table, torch.arange(0), heads).shape == (2, 0)


@pytest.mark.parametrize(("heads", "dim"), [(3, 8), (2, 16)], ids=["another number of heads", "another dim"])
def test_page_score_refuses_what_does_not_fit(heads: int, dim: int) -> None:
    queries, table = torch.zeros(heads, 2, dim), torch.zeros(5, 1, 4, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"\({heads}, 2, {dim}\) of 2 heads do not fit page keys \(5, 1, 4, 8\)"):
        page_score.page_score(queries, table, torch.arange(3), torch.tensor([0, 0]))


@pytest.mark.parametrize("overlap", [-1, 5])
def test_page_score_refuses_an_overlap_that_no_page_has(overlap: int) -> None:
    table = torch.zeros(5, 1, 4, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"overlap {overlap} is out of range: use 0 to 4, the keys of a page"):
        page_score.page_score(torch.zeros(1, 2, 8), table, torch.arange(3), torch.tensor([0]), overlap)


def test_page_score_refuses_keys_that_are_no_bytes() -> None:
    with pytest.raises(ValueError, match=r"page keys are torch.bfloat16: use what to_8_bits returns"):
        table = torch.zeros(5, 1, 4, 8, dtype=torch.bfloat16)
        page_score.page_score(torch.zeros(1, 2, 8), table, torch.arange(3), torch.tensor([0]))


def test_8_bits_hold_what_they_can() -> None:
    numbers = torch.tensor([0.0, 1.0, -1.5, 448.0, 1e6, -1e6, 0.015625, 17.0])
    kept = page_score.from_8_bits(page_score.to_8_bits(numbers))
    assert kept.tolist() == [0.0, 1.0, -1.5, 448.0, 448.0, -448.0, 0.015625, 16.0]


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(
    dim=st.sampled_from([1, 3, 16, 80]),
    tokens=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_the_bound_is_an_upper_bound_of_every_logit(dim: int, tokens: int, seed: int, spread: float) -> None:
    """Beside a page of zeros, whose bound is zero, the scores of two pages tell the bound: the log of their ratio."""
    query = random(dim, seed=seed)
    keys = random(tokens, dim, seed=seed + 1) * spread + random(dim, seed=seed + 2)
    scale = 1.0 / (dim * spread)  # keeps the softmax away from 0 and 1
    pages = torch.stack((keys, torch.zeros_like(keys)))[:, :, None]
    bounds = key_bounds(pages)[:, None]
    page, zeros = bound_score(query.view(1, 1, 1, dim), bounds, torch.arange(2), scale).double().tolist()
    bound = math.log(page / zeros) / scale
    logits = keys.double() @ query.double()
    slack = 1e-5 * (1 / scale + abs(bound))
    assert bound >= float(logits.max()) - slack
    if tokens == 1:
        assert bound == pytest.approx(float(logits[0]), abs=slack)
