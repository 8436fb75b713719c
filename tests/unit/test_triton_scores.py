"""Page keys and scores of one request: Triton against its torch references; see ``triton_cases``."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, FLOATS, NAN, SCORE_DTYPES, assert_same, ids, random, some

from sglang_lsa.kernels.attention_mass import _attention_mass_triton, attention_mass_reference
from sglang_lsa.kernels.bound_score import (
    _bound_score_triton,
    bound_score,
    bound_score_reference,
)
from sglang_lsa.kernels.page_keys import _store_key_bounds_triton, store_key_bounds_reference
from sglang_lsa.kernels.page_score import (
    _page_score_triton,
    page_score,
    page_score_reference,
    to_8_bits,
)
from sglang_lsa.kernels.retriever_score import _retriever_score_triton, pack_keys, retriever_score_reference

# --- page_keys -------------------------------------------------------------------------------------------------------

BOUNDS = [
    # pages, page, layers, kv_heads, head_dim
    pytest.param(0, 4, 2, 2, 8, id="0 pages"),
    pytest.param(1, 64, 2, 2, 8, id="1 page"),
    pytest.param(1, 1, 1, 1, 1, id="1 page of 1 token"),
    pytest.param(3, 63, 2, 3, 80, id="63 tokens, head_dim 80"),
    pytest.param(5, 64, 1, 8, 16, id="8 heads"),
    pytest.param(2, 4, 4, 2, 128, id="4 layers"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pages", "page", "layers", "heads", "dim"), BOUNDS)
def test_key_bounds(pages: int, page: int, layers: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    pools = [random(7 * page, heads, dim, dtype=dtype, seed=layer) for layer in range(layers)]
    for pool in pools:
        pool[:page] = NAN  # the padding page
    physical, virtual = ids(some(pages, 6)), ids(some(pages, 9, seed=1))
    table = torch.full((10, layers, 2, heads, dim), NAN, dtype=dtype, device=DEVICE)
    expected = table.clone()
    store_key_bounds_reference(pools, physical, virtual, expected, page)
    _store_key_bounds_triton(pools, physical, virtual, table, page)
    assert_same(table, expected)
    assert int(table[:, 0, 0, 0, 0].isnan().sum()) == 10 - pages


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_key_bounds_of_one_sign(sign: float) -> None:
    """What fills up a block must be no key: neither 0 nor what lies behind the page."""
    pool = sign * (1 + random(4 * 63, 1, 80).abs())
    table = torch.full((3, 1, 2, 1, 80), NAN, device=DEVICE)
    _store_key_bounds_triton([pool], ids([3]), ids([2]), table, 63)
    assert_same(table[2, 0, :, 0], torch.stack((pool[189:].amin(dim=0), pool[189:].amax(dim=0)))[:, 0])


def test_key_buffers_must_be_contiguous() -> None:
    pool = random(8, 2, 8).transpose(0, 1)
    with pytest.raises(ValueError, match=r"key buffer with strides \(8, 16, 1\) is not contiguous"):
        _store_key_bounds_triton([pool], ids([1]), ids([1]), torch.zeros(3, 1, 2, 8, 8, device=DEVICE), 1)


# --- page_score ------------------------------------------------------------------------------------------------------

SCORES = [
    # positions, layers, pages, kv_heads, group, head_dim
    pytest.param(2, 2, 1, 2, 1, 8, id="1 page"),
    pytest.param(1, 1, 2, 1, 1, 1, id="smallest"),
    pytest.param(2, 2, 9, 2, 1, 80, id="head_dim 80"),
    pytest.param(2, 1, 9, 3, 3, 16, id="groups of 3"),
    pytest.param(2, 2, 9, 1, 8, 16, id="groups of 8"),
    pytest.param(5, 4, 17, 2, 2, 8, id="5 positions, 4 layers"),
    pytest.param(2, 1, 63, 1, 1, 16, id="63 pages"),
    pytest.param(2, 1, 64, 1, 1, 16, id="64 pages"),
    pytest.param(2, 2, 200, 2, 3, 16, id="4 blocks of pages"),
    pytest.param(45, 1, 70, 1, 3, 16, id="2 blocks of voters and of pages"),
    pytest.param(32, 2, 130, 2, 3, 64, id="as in use"),
]


def scoring(
    positions: int, layers: int, pages: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, a table of bounds that is NaN but for the pages asked for, and those pages."""
    queries = random(positions, layers, kv_heads * group, dim, dtype=dtype, seed=1) * 2
    keys = random(pages, layers, 6, kv_heads, dim, dtype=dtype, seed=2)
    where = ids(some(pages, 2 * pages))
    table = torch.full((2 * pages + 1, layers, 2, kv_heads, dim), NAN, dtype=dtype, device=DEVICE)
    table[where] = torch.stack((keys.amin(dim=2), keys.amax(dim=2)), dim=2)
    return queries, table, where


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
@pytest.mark.parametrize(("positions", "layers", "pages", "kv_heads", "group", "dim"), SCORES)
def test_bound_score(
    positions: int, layers: int, pages: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype
) -> None:
    queries, table, where = scoring(positions, layers, pages, kv_heads, group, dim, dtype)
    expected = bound_score_reference(queries, table, where, dim**-0.5)
    scores = _bound_score_triton(queries, table, where, dim**-0.5)
    assert scores.shape == (pages,)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=FLOATS[dtype])


@pytest.mark.parametrize(("positions", "pages"), [(0, 3), (2, 0)], ids=["0 positions", "0 pages"])
def test_nothing_to_score(positions: int, pages: int) -> None:
    queries, table = random(positions, 1, 2, 8), random(4, 1, 2, 1, 8)
    assert bound_score(queries, table, ids(range(1, pages + 1)), 1.0).tolist() == [0.0] * pages


def test_a_slice_of_queries() -> None:
    queries, table, where = scoring(6, 2, 9, 2, 2, 16, torch.float32)
    part = queries[::2]
    assert not part.is_contiguous()
    expected = bound_score_reference(part.contiguous(), table, where, 0.25)
    torch.testing.assert_close(_bound_score_triton(part, table, where, 0.25), expected, rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    queries = torch.full((1, 1, 1, 4), 3e4, device=DEVICE)
    table = torch.full((100, 1, 2, 1, 4), 3e4, device=DEVICE)
    scores = _bound_score_triton(queries, table, ids(range(100)), 1.0)
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / 100), rtol=1e-5, atol=0)


def test_votes_against_every_page_but_one() -> None:
    """Logits far below zero: places behind the last page, and voters that are none, must not count as zero logits."""
    queries = torch.full((1, 1, 3, 16), -10.0, device=DEVICE)
    table = torch.full((71, 1, 2, 1, 16), 10.0, device=DEVICE)
    table[70] = 9.0
    scores = _bound_score_triton(queries, table, ids(range(1, 71)), 1.0)
    assert float(scores[69]) == pytest.approx(1.0)
    assert float(scores[:69].max()) < 1e-6


# --- attention_mass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "dim", "context", "page"),
    [
        pytest.param(3, 2, 2, 8, 10, 4, id="last page not full"),
        pytest.param(1, 3, 1, 80, 63, 64, id="63 tokens, head_dim 80, GQA 3"),
        pytest.param(5, 16, 2, 16, 128, 64, id="GQA 8, full pages"),
        pytest.param(1, 1, 1, 16, 1, 64, id="one token"),
        pytest.param(40, 7, 1, 64, 200, 64, id="several blocks of rows"),
        pytest.param(2, 4, 2, 16, 70, 63, id="page of 63"),
    ],
)
def test_attention_mass(
    tokens: int, q_heads: int, kv_heads: int, dim: int, context: int, page: int, dtype: torch.dtype
) -> None:
    queries, keys = random(tokens, q_heads, dim, dtype=dtype), random(300, kv_heads, dim, dtype=dtype, seed=1)
    slots, positions = ids(some(context, 299)), ids(range(context - tokens, context))
    expected = attention_mass_reference(queries, keys, slots, positions, dim**-0.5, page)
    seen = _attention_mass_triton(queries, keys, slots, positions, dim**-0.5, page)
    torch.testing.assert_close(seen, expected, rtol=0, atol=FLOATS[dtype])
    torch.testing.assert_close(seen.sum(dim=2), torch.ones_like(seen[:, :, 0]), rtol=0, atol=FLOATS[dtype])


def test_attention_mass_of_large_logits() -> None:
    queries, keys = torch.full((1, 1, 16), 1e3, device=DEVICE), torch.full((64, 1, 16), 1e3, device=DEVICE)
    mass = _attention_mass_triton(queries, keys, ids(range(64)), ids([63]), 1.0, 16)
    torch.testing.assert_close(mass, torch.full_like(mass, 0.25))


# --- retriever_score -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "heads", "n"),
    [
        pytest.param(1, 64, 200, id="64 heads, several blocks"),
        pytest.param(2, 128, 65, id="128 heads, last block not full"),
        pytest.param(3, 3, 1, id="3 heads, 1 key"),
    ],
)
def test_retriever_score(batch: int, heads: int, n: int) -> None:
    queries, weights = random(batch, heads, 128), random(batch, heads, seed=1) / heads
    packed = pack_keys(random(n, 128, seed=2))
    expected = retriever_score_reference(queries.double(), weights.double(), packed).float()
    seen = _retriever_score_triton(queries, weights, packed)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_retriever_score_reads_every_fp8_number() -> None:
    bits = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8, device=DEVICE)
    packed = pack_keys(torch.zeros((len(bits), 128), device=DEVICE))
    packed[:, 0] = bits
    packed[:, 128:] = torch.ones((len(bits), 1), device=DEVICE).view(torch.uint8)
    queries = torch.zeros((2, 1, 128), device=DEVICE)
    queries[0, 0, 0], queries[1, 0, 0] = 1.0, -1.0
    seen = _retriever_score_triton(queries, torch.ones((2, 1), device=DEVICE), packed)
    torch.testing.assert_close(seen[0] - seen[1], bits.view(torch.float8_e4m3fn).float(), rtol=0, atol=0)


# --- page_table ------------------------------------------------------------------------------------------------------

SHARES = [
    # heads, positions, pages, key_heads, sub_keys, dim
    pytest.param(1, 1, 1, 1, 1, 1, id="smallest"),
    pytest.param(3, 2, 17, 2, 8, 16, id="2 blocks of pages"),
    pytest.param(2, 5, 130, 1, 1, 64, id="1 key a page"),
    pytest.param(4, 70, 9, 3, 16, 32, id="2 blocks of positions"),
    pytest.param(2, 3, 40, 2, 4, 80, id="dim 80"),
    pytest.param(16, 64, 70, 6, 8, 64, id="as in use"),
    pytest.param(2, 64, 70, 1, 32, 32, id="32 keys of 32"),
]


def sharing(
    heads: int, positions: int, pages: int, key_heads: int, sub_keys: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, a table of keys that is NaN but for the pages asked for, those pages, and the key head of each head."""
    table = torch.full((2 * pages + 1, key_heads, sub_keys, dim), 127, dtype=torch.uint8, device=DEVICE)
    where = ids(some(pages, 2 * pages))
    table[where] = to_8_bits(random(pages, key_heads, sub_keys, dim, seed=2))
    queries = random(heads, positions, dim, dtype=dtype, seed=1) * 2 * dim**-0.5
    return queries, table, where, ids([(3 * head + 1) % key_heads for head in range(heads)])


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
@pytest.mark.parametrize(("heads", "positions", "pages", "key_heads", "sub_keys", "dim"), SHARES)
def test_page_score(
    heads: int,
    positions: int,
    pages: int,
    key_heads: int,
    sub_keys: int,
    dim: int,
    dtype: torch.dtype,
) -> None:
    given = sharing(heads, positions, pages, key_heads, sub_keys, dim, dtype)
    shares = _page_score_triton(*given)
    assert shares.shape == (heads, pages)
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares, page_score_reference(*given), rtol=0, atol=FLOATS[dtype])
    overlap = -(-sub_keys // 8)
    expected = page_score_reference(*given, overlap)
    torch.testing.assert_close(_page_score_triton(*given, overlap), expected, rtol=0, atol=FLOATS[dtype])


@pytest.mark.parametrize(("positions", "pages"), [(0, 3), (2, 0)], ids=["0 positions", "0 pages"])
def test_no_shares(positions: int, pages: int) -> None:
    queries, table, where, heads = sharing(2, 2, 3, 1, 2, 16, torch.float32)
    shares = page_score(queries[:, :positions], table, where[:pages], heads)
    assert shares.tolist() == [[0.0] * pages] * 2
