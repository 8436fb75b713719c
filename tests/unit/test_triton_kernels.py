"""Every Triton kernel against its torch reference: on a GPU, or else under Triton's interpreter.

The interpreter must be chosen before kernels are decorated (``TRITON_INTERPRET=1``), so on a machine without a GPU
these tests are skipped, and ``test_kernels.py`` runs this file once more in a process of its own. Outputs hold NaN, -1
or numbers of their own before a kernel runs, so that places that it should not touch, or should have, are seen.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sglang_lsa.kernels.attention_mass import _attention_mass_triton, attention_mass_reference
from sglang_lsa.kernels.bound_score import (
    _bound_score_triton,
    _bound_scores_triton,
    bound_score,
    bound_score_reference,
    bound_scores_reference,
)
from sglang_lsa.kernels.compact_table import (
    _compact_table_triton,
    _to_physical_triton,
    compact_table_reference,
    to_physical_reference,
)
from sglang_lsa.kernels.merge_shared import _merge_shared_triton, merge_shared_reference
from sglang_lsa.kernels.merge_states import _merge_states_triton, merge_states_reference
from sglang_lsa.kernels.page_keys import _store_key_bounds_triton, store_key_bounds_reference
from sglang_lsa.kernels.page_move import move_pages_reference, move_pages_triton, moves
from sglang_lsa.kernels.page_score import (
    Ragged,
    _page_score_triton,
    _page_scores_triton,
    page_score,
    page_score_reference,
    to_8_bits,
)
from sglang_lsa.kernels.page_table import (
    _decode_indices_triton,
    _decode_pages_triton,
    _physical_slots_triton,
    decode_indices_reference,
    decode_pages_reference,
    physical_slots_reference,
)
from sglang_lsa.kernels.project_queries import _project_queries_triton, project_queries_reference
from sglang_lsa.kernels.record import _record_triton, record_reference
from sglang_lsa.kernels.retriever_score import _retriever_score_triton, pack_keys, retriever_score_reference
from sglang_lsa.kernels.weigh_heads import _weigh_heads_triton, weigh_heads_reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NAN = float("nan")

if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; test_kernels.py runs these interpreted", allow_module_level=True)

FLOATS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Absolute tolerance of scores, which lie between 0 and 1."""


def named(dtypes: Sequence[torch.dtype]) -> list:
    return [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in dtypes]


DTYPES = named(list(FLOATS))
SCORE_DTYPES = DTYPES if ON_GPU else named([torch.float32, torch.float16])
"""The interpreter multiplies matrices of bfloat16 wrongly."""


def crossed(cases: Sequence[Any], *others: Sequence[Any], edges: Sequence[str]) -> list:
    """Cases with whatever else is varied: all with all on a GPU. Interpreted, which takes seconds a case, those of
    these ids with all of it, and the rest with the first of each."""
    usual = tuple(values[0] for values in others)
    return [
        pytest.param(*case.values, *(value for one in more for value in one.values), id="-".join(ids))
        for case in cases
        for more in itertools.product(*others)
        if ON_GPU or case.id in edges or more == usual
        for ids in [[str(one.id) for one in (case, *more)]]
    ]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def ids(values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(list(values), dtype=dtype, device=DEVICE)


def some(count: int, limit: int, seed: int = 0) -> list[int]:
    """``count`` different numbers from 1 to ``limit``, in no order."""
    return (1 + torch.randperm(limit, generator=torch.Generator().manual_seed(seed))[:count]).tolist()


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def assert_same(seen: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, NaN included."""
    torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)


# --- page_move -------------------------------------------------------------------------------------------------------


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def mha(layers: int, page: int, heads: int, dim: int, v_dim: int | None = None) -> list[int]:
    """Bytes of the buffers' pages, in bfloat16."""
    return [page * heads * width * 2 for width in (dim, v_dim or dim)] * layers


MOVES = [
    # bytes of each buffer's pages, physical -> virtual
    pytest.param(mha(2, 4, 2, 8), [], [], id="0 pages"),
    pytest.param(mha(2, 4, 2, 8), [3], [7], id="1 page"),
    pytest.param(mha(1, 64, 1, 16), [1, 4], [2, 1], id="page of 64, 1 layer, 1 head"),
    pytest.param(mha(2, 63, 1, 4), [1, 4], [2, 1], id="page of 63"),
    pytest.param(mha(3, 16, 3, 80), [5, 1, 3], [1, 9, 2], id="page of 16, head_dim 80"),
    pytest.param(mha(2, 64, 3, 80), [5, 1, 3], [1, 9, 2], id="a block is not full"),
    pytest.param(mha(1, 64, 8, 128), [2, 5], [9, 1], id="several blocks"),
    pytest.param(mha(1, 256, 2, 128), [2, 5], [9, 1], id="page of 256"),
    pytest.param(mha(5, 4, 8, 4), [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], id="all pages, more work than programs"),
    pytest.param(mha(2, 64, 2, 96, 64), [5, 2], [1, 9], id="keys wider than values"),
    pytest.param([24, 36], [5, 2], [1, 9], id="words of 4 bytes"),
    pytest.param([6, 10, 6], [5, 2], [1, 9], id="words of 2 bytes"),
    pytest.param([4099, 30, 1, 8], [5, 2], [1, 9], id="single bytes, several blocks"),
]


def on_device(buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [buffer.to(DEVICE, copy=True) for buffer in buffers]


def pinned(mirror: torch.Tensor) -> torch.Tensor:
    return mirror.pin_memory() if ON_GPU else mirror.clone()


@pytest.mark.parametrize("to_host", [True, False], ids=["to host", "from host"])
@pytest.mark.parametrize(("widths", "physical", "virtual"), MOVES)
def test_move_pages(widths: list[int], physical: list[int], virtual: list[int], to_host: bool) -> None:
    pool = [random_bytes(6, width, seed=number) for number, width in enumerate(widths)]
    offsets = [sum(widths[:number]) for number in range(len(widths))]
    expected_mirror = random_bytes(10, sum(widths), seed=200)
    seen, mirror = on_device(pool), pinned(expected_mirror)
    p, v = torch.tensor(physical, dtype=torch.int64), torch.tensor(virtual, dtype=torch.int64)
    move_pages_reference(moves(pool, offsets, expected_mirror), p, expected_mirror, v, to_host=to_host)

    move_pages_triton(moves(seen, offsets, mirror), ids(physical), mirror, ids(virtual), to_host=to_host)
    synchronize()
    assert_same(mirror, expected_mirror)
    for moved, expected in zip(seen, pool, strict=True):
        assert_same(moved.cpu(), expected)


@pytest.mark.parametrize("to_host", [True, False], ids=["to host", "from host"])
@pytest.mark.parametrize("widths", [mha(3, 4, 2, 80), [40, 12, 16, 9, 7, 40]], ids=["mha", "odd"])
def test_moving_one_layer_leaves_the_others(widths: list[int], to_host: bool) -> None:
    """Layer after layer, the copy is that of all layers."""
    physical, virtual = [5, 1, 3], [1, 9, 2]
    pool = [random_bytes(6, width, seed=number) for number, width in enumerate(widths)]
    offsets = [sum(widths[:number]) for number in range(len(widths))]
    expected_mirror = random_bytes(10, sum(widths), seed=200)
    seen, mirror = on_device(pool), pinned(expected_mirror)
    p, v = torch.tensor(physical), torch.tensor(virtual)
    for layer in range(0, len(widths), 2):
        layers = slice(layer, layer + 2)
        expected = moves(pool[layers], offsets[layers], expected_mirror)
        move_pages_reference(expected, p, expected_mirror, v, to_host=to_host)
        found = moves(seen[layers], offsets[layers], mirror)
        move_pages_triton(found, ids(physical), mirror, ids(virtual), to_host=to_host)
        synchronize()
        assert_same(mirror, expected_mirror)
        for moved, still in zip(seen, pool, strict=True):
            assert_same(moved.cpu(), still)


def test_pages_of_the_usual_sizes_move_in_words_of_8_bytes_with_one_launch() -> None:
    mirror = torch.zeros(2, sum(mha(4, 64, 8, 128)), dtype=torch.uint8)
    buffers = [torch.zeros(2, width, dtype=torch.uint8) for width in mha(4, 64, 8, 128)]
    (move,) = moves(buffers, range(0, mirror.shape[1], buffers[0].shape[1]), mirror)
    assert (move.buffers[0].dtype, move.width, move.unit) == (torch.int64, 16384, 16384)
    assert move.places.tolist() == list(range(8))


# --- merge_states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(0, 2, 8), (1, 1, 1), (63, 9, 64), (5, 32, 128), (17, 3, 80)])
def test_merge_states(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    """Some rows have no keys yet, some parts none at all, some neither."""
    out, part = random(tokens, heads, dim), random(tokens, heads, dim, dtype=dtype, seed=1)
    lse, part_lse = 20 * random(tokens, heads, seed=2), 20 * random(tokens, heads, seed=3)
    for gone, state in ((lse, out), (part_lse, part)):
        nothing = random(tokens, heads, seed=4 if gone is lse else 5) > 1
        gone[nothing] = float("-inf")
        state[nothing] = 0
    expected_out, expected_lse = out.cpu().clone(), lse.cpu().clone()
    merge_states_reference(expected_out, expected_lse, part.cpu(), part_lse.cpu())
    _merge_states_triton(out, lse, part, part_lse)
    torch.testing.assert_close(out.cpu(), expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-5, atol=1e-4)


# --- merge_shared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(0, 2, 8), (1, 1, 1), (7, 9, 64), (5, 32, 128), (17, 3, 80)])
def test_merge_shared(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    """Some tokens are in no group, rows that nobody is at hold NaN, and a group may have read nothing."""
    out, part = random(tokens, heads, dim, dtype=dtype), random(tokens, heads, dim, dtype=dtype, seed=1)
    lse, part_lse = 20 * random(tokens, heads, seed=2), 20 * random(tokens, heads, seed=3)
    members = torch.randperm(tokens, generator=torch.Generator().manual_seed(4))[: tokens - tokens // 3]
    places = torch.full((tokens,), -1, dtype=torch.int64)
    places[members] = torch.arange(len(members))
    for state in (part, part_lse):
        state[len(members) :] = NAN
    part_lse[:1] = float("-inf")
    places = places.to(DEVICE)
    expected = out.clone()
    merge_shared_reference(expected, lse, part, part_lse, places)
    before = out.clone()
    _merge_shared_triton(out, lse, part, part_lse, places)
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=FLOATS[dtype])
    assert_same(out[places < 0], before[places < 0])


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


# --- several requests at once ----------------------------------------------------------------------------------------

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


SUB_KEYS = [pytest.param(8, id="8 keys a page"), pytest.param(1, id="1 key a page")]


@pytest.mark.parametrize(("requests", "call", "sub_keys"), crossed(TOGETHER, CALLS, SUB_KEYS, edges=EDGES))
def test_page_scores(
    requests: Sequence[tuple[int, int, int, int]], call: int, sub_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a bit depends on who else is scored, nor what lies behind a request's positions."""
    monkeypatch.setattr("sglang_lsa.kernels.page_score.PARTIAL_BYTES", call)
    table = to_8_bits(random(201, 2, sub_keys, 16, seed=1))
    heads = ids([0, 1, 1])
    queries = random(len(requests), 3, PLACES, 16) * 0.5
    every, alone = together(requests)
    for index, (_, _, positions, _) in enumerate(requests):
        queries[index, :, positions:] = NAN
    shares = _page_scores_triton(queries, table, every, heads)
    expected = [
        page_score_reference(queries[index, :, :positions], table, one.pages, heads)
        if positions and len(one.pages)
        else torch.zeros(3, len(one.pages), device=DEVICE)
        for index, ((_, _, positions, _), one) in enumerate(zip(requests, alone, strict=True))
    ]
    torch.testing.assert_close(shares, torch.cat(expected, dim=1), rtol=0, atol=1e-5)
    own = [_page_scores_triton(queries[i : i + 1], table, one, heads) for i, one in enumerate(alone)]
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (1024,), (2500,)], ids=str)
def test_physical_slots(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    v2p = ids([0, *some(29, 29)], torch.int32)
    virtual = torch.randint(0, 30 * 63, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    slots = _physical_slots_triton(virtual, v2p, 63)
    assert slots.dtype == torch.int64
    assert_same(slots, physical_slots_reference(virtual, v2p, 63))


def test_physical_slots_of_a_slice() -> None:
    v2p, virtual = ids([0, 3, 1, 2], torch.int32), ids(range(16)).view(4, 4)
    assert_same(_physical_slots_triton(virtual[:, 1], v2p, 4), physical_slots_reference(virtual[:, 1], v2p, 4))


def test_physical_slots_beyond_int32() -> None:
    v2p = ids([0, 2**31 - 1], torch.int32)
    assert _physical_slots_triton(ids([70], torch.int32), v2p, 64).tolist() == [(2**31 - 1) * 64 + 6]


Row = tuple[int, int, int]
"""Resident pages, page where the tail starts, tokens."""

BATCHES = [
    pytest.param(64, [(0, 0, 1)], id="1 token"),
    pytest.param(64, [(0, 0, 64 * 9 + 3)], id="dense"),
    pytest.param(64, [(3, 9, 64 * 9 + 3)], id="resident and tail"),
    pytest.param(64, [(3, 9, 64 * 9)], id="no tail"),
    pytest.param(63, [(2, 5, 63 * 7 + 1), (0, 0, 63)], id="page of 63"),
    pytest.param(4, [(4, 7, 30), (0, 0, 5), (1, 2, 9), (0, 0, 1), (7, 7, 28)], id="5 requests"),
    pytest.param(64, [(20, 38, 64 * 40), (0, 0, 64 * 40), (39, 39, 64 * 39 + 1)], id="many pages"),
    pytest.param(4, [(index % 3, 3, 12 + index % 5) for index in range(33)], id="33 requests"),
]


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


@pytest.mark.parametrize(("positions", "pages"), [(0, 3), (2, 0)], ids=["0 positions", "0 pages"])
def test_no_shares(positions: int, pages: int) -> None:
    queries, table, where, heads = sharing(2, 2, 3, 1, 2, 16, torch.float32)
    shares = page_score(queries[:, :positions], table, where[:pages], heads)
    assert shares.tolist() == [[0.0] * pages] * 2


KINDS = [
    pytest.param(torch.int32, 0, id="int32"),
    pytest.param(torch.int64, 3, id="int64 and padding rows"),
]


class Batch:
    """A random table of resident pages, request table and page map, and the requests of one batch in them."""

    def __init__(self, page: int, batch: Sequence[Row], dtype: torch.dtype, padding: int) -> None:
        generator = torch.Generator().manual_seed(len(batch))
        longest = max(tokens for _, _, tokens in batch)
        spanned = -(-longest // page)
        count = len(batch)
        virtual = 1 + torch.randperm(count * spanned, generator=generator)
        tokens = torch.arange(spanned * page)
        self.page = page
        self.req_to_token = torch.full((count + 2, spanned * page), -1, dtype=torch.int32)
        self.req_to_token[0] = 0
        self.table = torch.full((count + 2, 2 + spanned), -1, dtype=torch.int32)
        self.table[0, :2] = 0
        self.v2p = torch.zeros(count * spanned + 1, dtype=torch.int32)
        self.v2p[1:] = 1 + torch.randperm(count * spanned, generator=generator).int()
        rows = (1 + torch.randperm(count + 1, generator=generator))[:count].tolist()
        for index, (row, (resident, tail, length)) in enumerate(zip(rows, batch, strict=True)):
            pages = virtual[index * spanned : (index + 1) * spanned]
            self.req_to_token[row, :length] = (pages[tokens // page] * page + tokens % page)[:length].int()
            kept = pages[torch.randperm(max(tail, 1), generator=generator)[:resident]]
            self.table[row, 0], self.table[row, 1] = resident, tail
            self.table[row, 2 : 2 + resident] = self.v2p[kept]
        self.rows = torch.tensor(rows + [0] * padding, dtype=dtype)
        self.seq_lens = torch.tensor([length for _, _, length in batch] + [1] * padding, dtype=dtype)
        reads = [(resident - tail) * page + length for resident, tail, length in batch] + [1] * padding
        self.total = sum(reads)
        self.lengths = reads
        for name in ("req_to_token", "table", "v2p", "rows", "seq_lens"):
            setattr(self, name, getattr(self, name).to(DEVICE))

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        indptr = torch.full((len(self.rows) + 3,), -1, dtype=torch.int32, device=DEVICE)
        return indptr, torch.full((self.total + 9,), -1, dtype=torch.int32, device=DEVICE)

    def run(self, function, indptr: torch.Tensor, indices: torch.Tensor) -> None:
        function(self.table, self.req_to_token, self.v2p, self.rows, self.seq_lens, self.page, indptr, indices)


@pytest.mark.parametrize(
    ("page", "rows", "dtype", "padding"), crossed(BATCHES, KINDS, edges=("1 token", "page of 63", "33 requests"))
)
def test_decode_indices(page: int, rows: Sequence[Row], padding: int, dtype: torch.dtype) -> None:
    batch = Batch(page, rows, dtype, padding)
    indptr, indices = batch.outputs()
    expected_indptr, expected = batch.outputs()
    batch.run(decode_indices_reference, expected_indptr, expected)
    batch.run(_decode_indices_triton, indptr, indices)
    assert_same(indptr, expected_indptr)
    assert_same(indices, expected)
    assert indptr[: len(batch.rows) + 1].diff().tolist() == batch.lengths
    assert indptr[len(batch.rows) + 1 :].tolist() == [-1, -1]
    assert indices[batch.total :].tolist() == [-1] * 9
    assert bool((indices[: batch.total] >= 0).all())


@pytest.mark.parametrize(
    ("dtype", "padding"), [(torch.int32, 0), (torch.int64, 3)], ids=["int32", "int64 and padding rows"]
)
@pytest.mark.parametrize(("page", "rows"), BATCHES)
def test_decode_pages(page: int, rows: Sequence[Row], padding: int, dtype: torch.dtype) -> None:
    batch = Batch(page, rows, dtype, padding)

    def run(function) -> tuple[torch.Tensor, torch.Tensor]:
        shape = len(batch.rows) + 1, max(-(-length // page) for length in batch.lengths) + 1
        pages = torch.full(shape, -1, dtype=torch.int32, device=DEVICE)
        lengths = torch.full((len(batch.rows) + 1,), -1, dtype=torch.int32, device=DEVICE)
        batch.run(function, pages, lengths)
        return pages, lengths

    (pages, lengths), (expected, expected_lengths) = run(_decode_pages_triton), run(decode_pages_reference)
    assert_same(pages, expected)
    assert_same(lengths, expected_lengths)
    assert lengths.tolist() == [*batch.lengths, -1]
    assert [int((row >= 0).sum()) for row in pages] == [*(-(-length // page) for length in batch.lengths), 0]


@pytest.mark.parametrize(
    ("dtype", "padding"), [(torch.int32, 0), (torch.int64, 3)], ids=["int32", "int64 and padding rows"]
)
@pytest.mark.parametrize("beyond", [0, 300], ids=["narrow", "wide"])
@pytest.mark.parametrize(("page", "rows"), [row for row in BATCHES if row.values[0] % 4 == 0])
def test_compact_table(page: int, rows: Sequence[Row], beyond: int, padding: int, dtype: torch.dtype) -> None:
    batch = Batch(page, rows, dtype, padding)
    width = max(-(-length // page) for length in batch.lengths) + beyond

    def run(function) -> tuple[torch.Tensor, torch.Tensor]:
        pages = torch.full((len(batch.rows), width), -1, dtype=torch.int32, device=DEVICE)
        entries = torch.full((len(batch.rows),), -1, dtype=torch.int32, device=DEVICE)
        tables = batch.table, batch.req_to_token, batch.v2p, batch.rows, batch.seq_lens
        function(*tables, page, 4, pages, entries)
        return pages, entries

    (pages, entries), (expected, expected_entries) = run(_compact_table_triton), run(compact_table_reference)
    assert_same(pages, expected)
    assert_same(entries, expected_entries)
    assert entries.tolist() == [length // 4 for length in batch.lengths]
    real = len(rows)
    assert [int((row > 0).sum()) for row in pages[:real]] == [-(-length // page) for length in batch.lengths[:real]]
    assert bool((pages[real:] == 0).all()), "padding rows read the padding page"


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 1025)], ids=str)
def test_to_physical(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    pages = torch.randint(-2, 22, shape, generator=generator, dtype=torch.int32).to(DEVICE)
    v2p = torch.tensor([0, *range(19, 0, -1)], dtype=torch.int32, device=DEVICE)
    expected = pages.clone()
    to_physical_reference(expected, v2p)
    assert_same(expected, torch.where((pages > 0) & (pages < 20), 20 - pages, 0))
    _to_physical_triton(pages, v2p)
    assert_same(pages, expected)


def test_decode_indices_of_an_empty_batch() -> None:
    batch = Batch(4, [(0, 0, 5)], torch.int64, 0)
    batch.rows, batch.seq_lens = batch.rows[:0], batch.seq_lens[:0]
    indptr, indices = batch.outputs()
    batch.run(_decode_indices_triton, indptr, indices)
    assert indices.tolist() == [-1] * len(indices)


# --- record ----------------------------------------------------------------------------------------------------------


RECORDS = [
    # tokens, width, ring length, slots
    pytest.param(0, 8, 4, 2, id="0 tokens"),
    pytest.param(1, 1, 1, 1, id="smallest"),
    pytest.param(1, 8, 4, 2, id="1 token"),
    pytest.param(5, 80, 8, 3, id="width 80"),
    pytest.param(8, 64, 63, 2, id="ring of 63"),
    pytest.param(9, 3 * 80, 32, 4, id="3 heads of 80"),
    pytest.param(3, 5000, 4, 2, id="wider than a block"),
]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "length", "slots"), RECORDS)
def test_record(tokens: int, width: int, length: int, slots: int, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    source = random(tokens, width, dtype=dtype)
    rows, positions = places(tokens, length, ids_dtype)
    ring = torch.full((6, length, slots, width), NAN, dtype=dtype, device=DEVICE)
    expected = ring.clone()
    record_reference(source, rows, positions, expected, slots - 1)
    _record_triton(source, rows, positions, ring, slots - 1)
    assert_same(ring, expected)
    assert int((~ring[..., 0].isnan()).sum()) == tokens


def places(tokens: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and positions of tokens of several requests; every position is beyond the first round of the ring."""
    rows = [1 + index % 5 for index in range(tokens)]
    return ids(rows, dtype), ids([3 * length + index // 5 for index in range(tokens)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_record_rows_of_a_wider_tensor(dtype: torch.dtype) -> None:
    """The queries are a part of what the projection of queries, keys and values gives."""
    whole = random(7, 3 * 16, dtype=dtype)
    source = whole[:, 16:32]
    assert not source.is_contiguous()
    rows, positions = places(7, 8, torch.int64)
    ring = torch.full((6, 8, 2, 16), NAN, dtype=dtype, device=DEVICE)
    expected = ring.clone()
    record_reference(source, rows, positions, expected, 0)
    _record_triton(source, rows, positions, ring, 0)
    assert_same(ring, expected)


def test_record_every_second_row() -> None:
    source = random(8, 16)[::2]
    rows, positions = places(4, 8, torch.int64)
    ring = torch.full((6, 8, 1, 16), NAN, device=DEVICE)
    expected = ring.clone()
    record_reference(source, rows, positions, expected, 0)
    _record_triton(source, rows, positions, ring, 0)
    assert_same(ring, expected)


def test_record_converts_to_the_type_of_the_ring() -> None:
    source = random(4, 16)
    rows, positions = places(4, 8, torch.int64)
    ring = torch.full((6, 8, 1, 16), NAN, dtype=torch.float16, device=DEVICE)
    expected = ring.clone()
    record_reference(source, rows, positions, expected, 0)
    _record_triton(source, rows, positions, ring, 0)
    assert_same(ring, expected)


@pytest.mark.parametrize("length", [1, 3, 8])
def test_record_the_last_tokens_of_each_request(length: int) -> None:
    """Prompts longer, as long and shorter than the ring, beside one that decodes, and padding that shares row 0."""
    tokens = {2: 8, 1: 3, 4: 1, 5: 20, 0: 2}
    rows = ids([row for row, count in tokens.items() for _ in range(count)])
    positions = ids([100 * row + index for row, count in tokens.items() for index in range(count)])
    source = random(len(rows), 80)
    ring = torch.full((6, length, 2, 80), NAN, device=DEVICE)
    expected = ring.clone()
    for index, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        expected[row, position % length, 1] = source[index]
    for run in (_record_triton, record_reference):
        seen = ring.clone()
        run(source, rows, positions, seen, 1, True)
        assert_same(seen, expected)


@pytest.mark.parametrize(
    ("source", "ring"),
    [
        pytest.param(torch.zeros(4, 2).T, torch.zeros(3, 2, 1, 4), id="source"),
        pytest.param(torch.zeros(2, 4), torch.zeros(2, 3, 1, 4).transpose(0, 1), id="ring"),
    ],
)
def test_record_refuses_what_is_not_contiguous(source: torch.Tensor, ring: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"source strides \(.*\) or ring strides \(.*\) are not contiguous"):
        _record_triton(source, ids([1, 2]), ids([0, 0]), ring, 0)


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


needs_graphs = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")


@needs_graphs
def test_record_in_a_cuda_graph() -> None:
    """Replayed with other rows, positions and content, it records those."""
    source = random(5, 80)
    rows, positions = places(5, 8, torch.int64)
    ring = torch.full((6, 8, 2, 80), NAN, device=DEVICE)
    _record_triton(source, rows, positions, ring.clone(), 1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _record_triton(source, rows, positions, ring, 1)
    for step in range(3):
        source.copy_(random(5, 80, seed=step))
        positions.add_(1)
        rows.copy_(rows.roll(1))
        ring.fill_(NAN)
        expected = ring.clone()
        record_reference(source, rows, positions, expected, 1)
        graph.replay()
        assert_same(ring, expected)


@needs_graphs
def test_decode_indices_in_a_cuda_graph() -> None:
    """Replayed with another table and other lengths, it writes what they say."""
    batch = Batch(64, [(3, 9, 64 * 9 + 3), (0, 0, 64 * 4), (2, 5, 64 * 9 + 3)], torch.int64, 2)
    indptr, _ = batch.outputs()
    indices = torch.full((1000,), -1, dtype=torch.int32, device=DEVICE)
    batch.run(_decode_indices_triton, indptr, indices)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.run(_decode_indices_triton, indptr, indices)
    first = int(batch.rows[0])
    for shorter, resident in ((0, 3), (5, 2), (67, 1)):
        batch.seq_lens[0] = 64 * 9 + 3 - shorter
        batch.table[first, 0] = resident
        batch.table[first, 1] = 8
        expected_indptr, expected = torch.full_like(indptr, -1), torch.full_like(indices, -1)
        batch.run(decode_indices_reference, expected_indptr, expected)
        indptr.fill_(-1)
        indices.fill_(-1)
        graph.replay()
        assert_same(indptr, expected_indptr)
        assert_same(indices, expected)
