"""Kernels against naive loops in float64, over shapes and types; and that Quest's bound is one.

What a GPU runs instead is compared with these in ``test_triton_*.py``.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_lsa.kernels import bound_score as bound_score_module
from sglang_lsa.kernels import page_score
from sglang_lsa.kernels.attention_mass import attention_mass
from sglang_lsa.kernels.bound_score import bound_score
from sglang_lsa.kernels.merge_states import base_2, merge_states
from sglang_lsa.kernels.page_keys import key_bounds
from sglang_lsa.kernels.page_move import pages_from_host, pages_to_host
from sglang_lsa.kernels.page_table import decode_indices, decode_pages, physical_slots, resident_slots
from sglang_lsa.kernels.record import record

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Absolute, for values of about one. Scores are computed in float32 whatever the type, so inputs decide."""

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
NAN = float("nan")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- page_move -------------------------------------------------------------------------------------------------------


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


MOVES = [
    # bytes of each buffer's pages, physical -> virtual
    pytest.param([128, 128], [], [], id="0 pages"),
    pytest.param([128, 128], [3], [7], id="1 page"),
    pytest.param([2048, 2048], [1, 4], [2, 1], id="page of 64 tokens, 1 layer, 1 head"),
    pytest.param([960] * 6, [5, 1, 3], [1, 9, 2], id="head_dim 80, 3 layers"),
    pytest.param([16] * 4, [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], id="all pages"),
    pytest.param([24, 36], [5, 2], [1, 9], id="words of 4 bytes, two widths"),
    pytest.param([6, 10, 6], [5, 2], [1, 9], id="words of 2 bytes"),
    pytest.param([7, 30, 1, 8], [5, 2], [1, 9], id="single bytes, four widths"),
]


@pytest.mark.parametrize(("widths", "physical", "virtual"), MOVES)
def test_page_move(widths: list[int], physical: list[int], virtual: list[int]) -> None:
    buffers = [random_bytes(6, width, seed=number) for number, width in enumerate(widths)]
    offsets = [sum(widths[:number]) for number in range(len(widths))]
    mirror = random_bytes(10, sum(widths), seed=50)
    expected = mirror.clone()
    for p, v in zip(physical, virtual, strict=True):
        for buffer, offset in zip(buffers, offsets, strict=True):
            for byte, value in enumerate(buffer[p].tolist()):
                expected[v, offset + byte] = value
    p, v = torch.tensor(physical, dtype=torch.int64), torch.tensor(virtual, dtype=torch.int64)

    pages_to_host(buffers, offsets, p, mirror, v)
    assert torch.equal(mirror, expected)

    before = [random_bytes(6, width, seed=100 + number) for number, width in enumerate(widths)]
    after = [buffer.clone() for buffer in before]
    pages_from_host(after, offsets, p, mirror, v)
    for new, old, copied in zip(after, before, buffers, strict=True):
        for page in range(6):
            assert torch.equal(new[page], (copied if page in physical else old)[page])


def test_a_part_of_a_mirror_page_is_moved_alone() -> None:
    """One layer, or another pool's bytes beside it."""
    buffers, mirror, one = [random_bytes(4, 8, seed=1), random_bytes(4, 8, seed=2)], random_bytes(4, 40), torch.tensor
    expected = mirror.clone()
    expected[2, 8:16], expected[2, 32:40] = buffers[0][3], buffers[1][3]
    pages_to_host(buffers, [8, 32], one([3]), mirror, one([2]))
    assert torch.equal(mirror, expected)


BYTES = torch.zeros(64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("buffer", "offset", "words"),
    [
        pytest.param(BYTES[:24].view(3, 8), 9, "8 bytes at 9 do not fit into a mirror page of 16", id="end"),
        pytest.param(BYTES[:24].view(3, 8), -1, "8 bytes at -1 do not fit", id="begin"),
        pytest.param(BYTES.view(2, 32).float(), 0, r"torch.float32 .*give contiguous uint8 \[pages, byte", id="floats"),
        pytest.param(BYTES.view(4, 16)[:, :8], 0, r"strides \(16, 1\)", id="not contiguous"),
        pytest.param(BYTES[1:25].view(3, 8), 0, "at a multiple of 16", id="not aligned"),
    ],
)
@pytest.mark.parametrize("copy", [pages_to_host, pages_from_host])
def test_buffers_that_do_not_fit_are_refused(copy, buffer: torch.Tensor, offset: int, words: str) -> None:
    mirror, page = torch.zeros(3, 16, dtype=torch.uint8), torch.tensor([1])
    with pytest.raises(ValueError, match=words):
        copy([buffer], [offset], page, mirror, page)


# --- attention_mass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "dim", "context", "page"),
    [
        pytest.param(3, 2, 2, 8, 10, 4, id="last page not full"),
        pytest.param(1, 3, 1, 80, 63, 64, id="63 tokens, head_dim 80, GQA 3"),
        pytest.param(5, 16, 2, 16, 128, 64, id="GQA 8, full pages"),
        pytest.param(1, 1, 1, 4, 1, 64, id="one token"),
        pytest.param(0, 2, 2, 8, 10, 4, id="no query"),
        pytest.param(130, 2, 1, 4, 140, 16, id="more queries than at once"),
    ],
)
def test_attention_mass(
    tokens: int, q_heads: int, kv_heads: int, dim: int, context: int, page: int, dtype: torch.dtype
) -> None:
    queries, keys = random(tokens, q_heads, dim, dtype=dtype), random(300, kv_heads, dim, dtype=dtype, seed=1)
    slots = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:context]
    positions = torch.arange(context - tokens, context)
    seen = attention_mass(queries, keys, slots, positions, dim**-0.5, page)
    assert seen.shape == (tokens, q_heads, -(-context // page)) and seen.dtype == torch.float32
    for token in range(tokens):
        for head in range(q_heads):
            own = keys[slots[: positions[token] + 1], head // (q_heads // kv_heads)].double()
            share = (own @ queries[token, head].double() * dim**-0.5).softmax(0)
            by_page = [part.sum() for part in share.split(page)]
            by_page += [torch.zeros(())] * (seen.shape[2] - len(by_page))
            torch.testing.assert_close(seen[token, head].double(), torch.stack(by_page).double(), atol=1e-5, rtol=0)


def test_attention_mass_of_heads_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit keys"):
        attention_mass(random(1, 3, 4), random(8, 2, 4), torch.arange(4), torch.tensor([3]), 1.0, 4)


# --- merge_states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [(7,), (3, 4), (1, 1, 1, 4), (0, 7), (7, 0), (0, 3, 0, 4)], ids=str)
def test_merged_parts_are_attention_over_all_keys(parts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against a softmax over all keys in float64."""
    tokens, heads, dim, keys = 5, 3, 16, 7
    logits, values = random(tokens, heads, keys).double() * 9, random(keys, heads, dim, seed=1).double()
    expected = torch.einsum("thk,khd->thd", logits.softmax(-1), values)
    out, lse = torch.zeros(tokens, heads, dim), torch.full((tokens, heads), float("-inf"))
    start = 0
    for count in parts:
        some = logits[..., start : start + count]
        part = torch.einsum("thk,khd->thd", some.softmax(-1), values[start : start + count])
        merge_states(out, lse, part.to(dtype), (some.logsumexp(-1) / math.log(2)).float())
        start += count
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype] * 2)
    torch.testing.assert_close(lse.double() * math.log(2), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)


def test_natural_logarithms_of_heads_as_base_2_of_tokens() -> None:
    """FlashAttention's log-sum-exps; where there were no keys they are infinite, some kernels say with which sign."""
    lse = torch.tensor([[1.0, 2.0, float("inf")], [0.0, float("-inf"), -3.0]])
    found = base_2(lse)
    assert found.is_contiguous()
    assert found.T[0].tolist() == pytest.approx([1 / math.log(2), 2 / math.log(2), float("-inf")])
    assert found.T[1].tolist() == pytest.approx([0.0, float("-inf"), -3 / math.log(2)])


@pytest.mark.parametrize(
    ("shapes", "dtype", "words"),
    [
        (((2, 3, 4), (2, 3), (2, 3, 5), (2, 3)), torch.float32, "cannot be merged"),
        (((2, 3, 4), (2, 3), (2, 3, 4), (2, 4)), torch.float32, "cannot be merged"),
        (((2, 3, 4), (3, 2), (2, 3, 4), (3, 2)), torch.float32, "cannot be merged"),
        (((2, 3, 4), (2, 3), (2, 3, 4), (2, 3)), torch.bfloat16, "keep it in float32"),
    ],
)
def test_states_that_do_not_fit_are_refused(shapes: tuple, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        merge_states(*(torch.zeros(shape, dtype=dtype) for shape in shapes))


# --- page_keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("pages", "tokens", "heads", "dim"),
    [
        pytest.param(0, 64, 2, 8, id="0 pages"),
        pytest.param(1, 1, 1, 1, id="1 page of 1 token"),
        pytest.param(3, 63, 3, 80, id="63 tokens, head_dim 80"),
        pytest.param(5, 64, 8, 16, id="8 heads"),
    ],
)
def test_key_bounds(pages: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    keys = random(pages, tokens, heads, dim, dtype=dtype)
    bounds = key_bounds(keys)
    assert bounds.shape == (pages, 2, heads, dim)
    assert bounds.dtype == dtype
    for page in range(pages):
        for head in range(heads):
            for d in range(dim):
                column = keys[page, :, head, d].tolist()
                assert bounds[page, :, head, d].tolist() == [min(column), max(column)]


# --- page_score ------------------------------------------------------------------------------------------------------


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


def test_a_page_gets_the_largest_share_of_any_position() -> None:
    """By the definition, head by head and position by position, in float64."""
    queries, numbers = random(3, 5, 8, seed=1), page_score.to_8_bits(random(7, 2, 4, 8, seed=2))
    table, ids = scattered(numbers.view(torch.float8_e4m3fn).half())
    table = page_score.to_8_bits(table)  # not a number where there is no page
    keys = page_score.from_8_bits(numbers)
    of_head = torch.tensor([1, 0, 1])
    shares = page_score.page_score(queries, table, ids, of_head)
    assert shares.shape == (3, 7)
    for head in range(3):
        flat = keys[:, of_head[head]].reshape(28, 8).double()
        attention = torch.stack([(flat @ queries[head, t].double()).softmax(0) for t in range(5)])
        expected = attention.view(5, 7, 4).sum(2).amax(0)
        torch.testing.assert_close(shares[head].double(), expected, rtol=0, atol=1e-6)


def test_shares_of_many_pages_are_found_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = random(2, 3, 8, seed=1)
    table, ids = scattered(random(17, 1, 4, 8, seed=2))
    table = page_score.to_8_bits(table)
    of_head = torch.zeros(2, dtype=torch.int64)
    whole = page_score.page_score(queries, table, ids, of_head)
    for at_once in (1, 4, 16, 17):
        monkeypatch.setattr(page_score, "PAGES_AT_ONCE", at_once)
        shares = page_score.page_score(queries, table, ids, of_head)
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


# --- page_table ------------------------------------------------------------------------------------------------------


PAGE = 4


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_physical_slots(dtype: torch.dtype) -> None:
    v2p = torch.tensor([0, 3, 0, 1, 2])
    virtual = torch.tensor([[0, 3, 4, 7], [12, 15, 16, 18]], dtype=dtype)
    slots = physical_slots(virtual, v2p, PAGE)
    assert slots.dtype == torch.int64
    assert slots.tolist() == [[0, 3, 12, 15], [4, 7, 8, 10]]
    assert physical_slots(virtual[:0], v2p, PAGE).shape == (0, 4)


def test_physical_slots_beyond_int32() -> None:
    v2p = torch.zeros(3, dtype=torch.int64)
    v2p[2] = 2**40
    assert physical_slots(torch.tensor([9], dtype=torch.int32), v2p, PAGE).tolist() == [2**40 * 4 + 1]


ROWS = [
    # resident pages (positions of the request), tail_start, tokens
    pytest.param([], 0, 1, id="dense, 1 token"),
    pytest.param([], 0, 23, id="dense"),
    pytest.param([0, 2, 3], 5, 23, id="resident and tail"),
    pytest.param([0, 2, 3], 5, 20, id="tail begins with the next token"),
    pytest.param([0, 4], 5, 21, id="tail of 1 token"),
    pytest.param([1], 2, 23, id="tail of several pages"),
    pytest.param([0, 1, 2, 3, 4], 5, 24, id="all"),
]


@pytest.mark.parametrize(("positions", "tail_start", "tokens"), ROWS)
def test_resident_slots(positions: list[int], tail_start: int, tokens: int) -> None:
    virtual_pages = [9, 2, 7, 4, 1, 5]
    v2p = torch.tensor([0, 6, 11, 0, 3, 8, 0, 1, 0, 4, 0])
    req_to_token = torch.full((4, 40), -1, dtype=torch.int32)
    for token in range(24):
        req_to_token[2, token] = virtual_pages[token // PAGE] * PAGE + token % PAGE
    pages = torch.full((4, 8), -1)
    for place, position in enumerate(positions):
        pages[2, place] = v2p[virtual_pages[position]]
    count, start = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    count[2], start[2] = len(positions), tail_start

    read = [token for token in range(tokens) if token // PAGE in positions or token // PAGE >= tail_start]
    expected = [int(v2p[virtual_pages[token // PAGE]]) * PAGE + token % PAGE for token in read]

    # Beside it in the batch: another row, dense, and the padding row, whose slots are the padding page's.
    req_to_token[3, :2] = torch.tensor([4 * PAGE, 4 * PAGE + 1])
    req_to_token[0] = 0
    rows, lengths = torch.tensor([3, 2, 0]), torch.tensor([2, tokens, 1])
    result = resident_slots(pages, count, start, req_to_token, v2p, rows, lengths, PAGE)
    assert [slots.tolist() for slots in result] == [[12, 13], expected, [0]]
    assert all(slots.dtype == torch.int64 for slots in result)


def test_resident_slots_of_an_empty_batch() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    table = torch.zeros((2, 3), dtype=torch.int64)
    assert resident_slots(table, table[:, 0], table[:, 0], table, none, none, none, PAGE) == []


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_decode_indices(table_dtype: torch.dtype) -> None:
    """The slots of :func:`resident_slots`, one request after the other, and nothing behind them."""
    req_to_token = torch.arange(3 * 20, dtype=torch.int32).view(3, 20) + 4
    v2p = torch.randperm(16, generator=torch.Generator().manual_seed(0)).int()
    table = torch.tensor([[0, 0, -1, -1], [2, 4, 9, 3], [0, 0, -1, -1]], dtype=table_dtype)
    rows, lengths = torch.tensor([2, 1, 0]), torch.tensor([7, 18, 1])
    indptr, indices = torch.full((6,), -1, dtype=torch.int32), torch.full((30,), -1, dtype=torch.int32)
    decode_indices(table, req_to_token, v2p, rows, lengths, PAGE, indptr, indices)
    assert indptr.tolist() == [0, 7, 7 + 8 + 2, 18, -1, -1]
    slots = resident_slots(table[:, 2:], table[:, 0], table[:, 1], req_to_token, v2p, rows, lengths, PAGE)
    assert indices.tolist() == [*torch.cat(slots).tolist(), *[-1] * 12]
    assert indices[7:15].tolist() == [36, 37, 38, 39, 12, 13, 14, 15]


@pytest.mark.parametrize("page", [1, 4, 16])
def test_decode_pages_hold_the_slots_that_are_read(page: int) -> None:
    """Page by page what :func:`resident_slots` names, and nothing behind it."""
    context = page * 5
    req_to_token = torch.arange(3 * context, dtype=torch.int32).view(3, context) + page
    v2p = torch.randperm(16, generator=torch.Generator().manual_seed(0)).int()
    table = torch.tensor([[0, 0, -1, -1], [2, 4, 9, 3], [0, 0, -1, -1]], dtype=torch.int32)
    rows, lengths = torch.tensor([2, 1, 0]), torch.tensor([page + 1, context - page // 2, 1])
    pages, read = torch.full((4, 6), -1, dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)
    decode_pages(table, req_to_token, v2p, rows, lengths, page, pages, read)
    slots = resident_slots(table[:, 2:], table[:, 0], table[:, 1], req_to_token, v2p, rows, lengths, page)
    assert read.tolist() == [*(len(found) for found in slots), -1]
    for found, row in zip(slots, pages, strict=False):
        count = -(-len(found) // page)
        seen = (row[:count, None].long() * page + torch.arange(page)).flatten()[: len(found)]
        assert torch.equal(seen, found)
        assert (row[count:] == -1).all()
    assert (pages[3] == -1).all()


def test_decode_pages_of_an_empty_batch() -> None:
    none, table = torch.zeros(0, dtype=torch.int64), torch.zeros((2, 3), dtype=torch.int32)
    pages, read = torch.full((1, 1), -1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    decode_pages(table, table, none, none, none, PAGE, pages, read)
    assert (pages.item(), read.item()) == (-1, -1)


def test_decode_indices_of_an_empty_batch() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    table, indptr = torch.zeros((2, 3), dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    decode_indices(table, table, none, none, none, PAGE, indptr, torch.zeros(0, dtype=torch.int32))
    assert indptr.tolist() == [0]


# --- record ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_record(dtype: torch.dtype) -> None:
    ring, source = torch.full((4, 3, 2, 5), NAN), random(4, 5)
    expected = ring.clone()
    rows, positions = [1, 3, 1, 1], [3, 8, 4, 5]
    for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
        expected[row, position % 3, 1] = source[index]
    record(source, torch.tensor(rows, dtype=dtype), torch.tensor(positions, dtype=dtype), ring, 1)
    assert torch.equal(ring.nan_to_num(-77), expected.nan_to_num(-77))


# --- what a GPU runs -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton_*.py run on this GPU themselves")
def test_triton_kernels_under_the_interpreter() -> None:
    files = sorted(map(str, pathlib.Path(__file__).parent.glob("test_triton_*.py")))
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped|failed)", run.stdout)}
    assert counts["passed"] >= 170
    assert counts.pop("skipped") == run.stdout.count("CUDA graphs need a GPU") == 2
    assert counts.keys() == {"passed"}
