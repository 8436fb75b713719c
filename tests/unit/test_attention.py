"""attend: causal attention of a chunk's queries against naive loops in float64; whole, and part by part."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_lsa.attend.torch_native import (
    QUERY_BLOCK,
    LSATorchBackend,
    attend,
    attend_in_float32,
    attend_in_groups,
    attend_part,
)
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.grouping import Grouping, Groups
from sglang_lsa.engine.groups import Group, GroupRules
from sglang_lsa.engine.reading import Reading
from sglang_lsa.engine.remap import ResidentSets
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.step import DECODE, Batch, Step
from sglang_lsa.kernels.merge_states import merge_states
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.ledger import Ledger
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.memory.staging import Staging

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Query ``i`` of ``n`` is token ``length - n + i`` and sees the tokens up to itself."""
    n, q_heads, _ = q.shape
    length, kv_heads, _ = keys.shape
    out = torch.empty(n, q_heads, values.shape[2], dtype=torch.float64)
    for head in range(q_heads):
        kv = head // (q_heads // kv_heads)
        k, v = keys[:, kv].double(), values[:, kv].double()
        for i in range(n):
            visible = length - n + i + 1
            weights = torch.softmax(k[:visible] @ q[i, head].double() * scale, dim=0)
            out[i, head] = weights @ v[:visible]
    return out


CHUNKS = [
    # new tokens, tokens in all
    pytest.param(1, 1, id="first token"),
    pytest.param(1, 200, id="decode"),
    pytest.param(7, 7, id="whole prompt"),
    pytest.param(2, 3, id="short chunk"),
    pytest.param(7, 71, id="chunk after a prefix"),
]
LONG = [
    pytest.param(QUERY_BLOCK, QUERY_BLOCK + 1, id="one block"),
    pytest.param(QUERY_BLOCK + 1, QUERY_BLOCK + 30, id="one block and one query"),
    pytest.param(2 * QUERY_BLOCK, 2 * QUERY_BLOCK + 64, id="two blocks"),
]
HEADS = [
    # kv_heads, group, head_dim
    pytest.param(2, 1, 16, id="MHA"),
    pytest.param(1, 3, 80, id="groups of 3, head_dim 80"),
    pytest.param(1, 8, 16, id="groups of 8"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "dim"), HEADS)
@pytest.mark.parametrize(("n", "length"), CHUNKS)
def test_attend(n: int, length: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    check_attend(n, length, kv_heads, group, dim, dtype)


@pytest.mark.parametrize(("kv_heads", "group", "dim"), HEADS)
@pytest.mark.parametrize(("n", "length"), LONG)
def test_attend_in_blocks_of_queries(n: int, length: int, kv_heads: int, group: int, dim: int) -> None:
    check_attend(n, length, kv_heads, group, dim, torch.float32)


def check_attend(n: int, length: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    q = random(n, kv_heads * group, dim, dtype=dtype, seed=1)
    keys = random(length, kv_heads, dim, dtype=dtype, seed=2)
    values = random(length, kv_heads, dim, dtype=dtype, seed=3)
    out = attend(q, keys, values, dim**-0.5)
    assert out.shape == q.shape
    assert out.dtype == dtype
    # Beyond one block the naive loops would take long; the rows around its borders are what could be wrong.
    rows = [row for row in range(n) if n <= 16 or row % QUERY_BLOCK in (0, 1, QUERY_BLOCK - 1) or row == n - 1]
    seen = [length - n + row + 1 for row in rows]
    expected = [naive(q[[row]], keys[:end], values[:end], dim**-0.5) for row, end in zip(rows, seen, strict=True)]
    torch.testing.assert_close(out[rows].double(), torch.cat(expected), rtol=0, atol=TOLERANCE[dtype])


def test_values_of_another_width() -> None:
    q, keys = random(5, 2, 16, dtype=torch.float32, seed=1), random(12, 2, 16, dtype=torch.float32, seed=2)
    values = random(12, 2, 4, dtype=torch.float32, seed=3)
    torch.testing.assert_close(
        attend(q, keys, values, 0.25).double(), naive(q, keys, values, 0.25), rtol=0, atol=TOLERANCE[torch.float32]
    )


def test_a_cache_of_another_type_is_read_in_the_type_of_the_queries() -> None:
    q, keys = random(5, 2, 16, dtype=torch.float32, seed=1), random(12, 2, 16, dtype=torch.bfloat16, seed=2)
    values = random(12, 2, 16, dtype=torch.bfloat16, seed=3)
    out = attend(q, keys, values, 0.25)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), naive(q, keys, values, 0.25), rtol=0, atol=TOLERANCE[torch.float32])


def grouping_of(groups: list[tuple[tuple[int, ...], list[int]]], batch: int) -> Grouping:
    """Groups of a batch, each with the physical pages that its members read together."""
    order = np.array([place for members, _ in groups for place in members], dtype=np.int64)
    places = np.full(batch, -1, dtype=np.int64)
    places[order] = np.arange(len(order))
    formed = tuple(Group(members, np.arange(len(pages)), 0, 0.0) for members, pages in groups)
    table = ResidentTable(batch + 1, 4, PAGE_SIZE)
    return Grouping(formed, tuple(np.array(pages, dtype=np.int64) for _, pages in groups), order, places, table)


def backend_of(
    sets: ResidentSets, ledger: Ledger, req_to_token: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor], step: Step
) -> LSATorchBackend:
    """The backend in a decode step; SGLang's part of it needs a model runner."""
    backend = object.__new__(LSATorchBackend)
    backend.use_sliding_window_kv_pool = False
    backend.req_to_token_pool = SimpleNamespace(req_to_token=req_to_token)
    keys, values = pools
    backend.token_to_kv_pool = SimpleNamespace(get_key_buffer=lambda _: keys, get_value_buffer=lambda _: values)
    backend.lsa = SimpleNamespace(
        step=step,
        table=sets.table,
        pager=SimpleNamespace(page=PAGE_SIZE, v2p=torch.from_numpy(ledger.v2p)),
        observer=SimpleNamespace(slot_of_layer={}),
        recorder=None,
    )
    return backend


def decoding(requests: list[Request], lengths: list[int]) -> SimpleNamespace:
    """What SGLang says of a decode step."""
    rows = torch.tensor([request.row for request in requests])
    mode = SimpleNamespace(is_decode=lambda: True, is_extend=lambda: False)
    return SimpleNamespace(forward_mode=mode, req_pool_indices=rows, seq_lens=torch.tensor(lengths))


def test_what_reads_all_is_rounded_as_stock_rounds_it() -> None:
    """In bfloat16: the same attention as for a prompt's last token; one that is pruned is rounded once."""
    pages, dim = 6, 64
    keys, values = (random((pages + 1) * PAGE_SIZE, 1, dim, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    ledger = Ledger(virtual_pages=pages, physical_pages=pages)
    ledger.v2p[1:] = np.arange(pages) + 1
    sets = ResidentSets(ResidentTable(6, pages, PAGE_SIZE), ledger)
    length = 2 * PAGE_SIZE + 9
    req_to_token, requests = torch.zeros(6, 4 * PAGE_SIZE, dtype=torch.int32), []
    for number, (positions, tail_start) in enumerate([([], 0), ([1], 2)]):
        request = Request(f"r{number}", number + 1, Asked("quest", 0.5), prompt_tokens=length - 1)
        request.pages = np.arange(3) + 3 * number + 1
        req_to_token[request.row, : 3 * PAGE_SIZE] = torch.arange(3 * PAGE_SIZE) + int(request.pages[0]) * PAGE_SIZE
        sets.enter(request.row)
        sets.remap(request, np.array(positions, dtype=np.int64), tail_start)
        requests.append(request)
    batch = Batch(DECODE, tuple(request.key for request in requests), (length,) * 2, (length - 1,) * 2)
    backend = backend_of(sets, ledger, req_to_token, (keys, values), Step.of(batch, requests))
    forward = decoding(requests, [length] * 2)
    backend.init_forward_metadata(forward)
    q = random(2, 3, dim, dtype=torch.bfloat16, seed=1)
    layer = SimpleNamespace(layer_id=0, tp_q_head_num=3, qk_head_dim=dim, v_head_dim=dim, scaling=dim**-0.5)
    whole, pruned = backend.forward_decode(q.flatten(1), None, None, layer, forward, save_kv_cache=False)
    everything = slice(PAGE_SIZE, PAGE_SIZE + length)
    assert torch.equal(whole.view(1, 3, dim), attend(q[:1], keys[everything], values[everything], dim**-0.5))
    read = slice(5 * PAGE_SIZE, 4 * PAGE_SIZE + length)
    expected = naive(q[1:], keys[read], values[read], dim**-0.5).to(torch.bfloat16)
    torch.testing.assert_close(pruned.view(1, 3, dim), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "dim"), HEADS)
def test_attention_in_groups(kv_heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    """Two groups, whose members are not side by side, and a request in none: each is attention over the union of what
    its group reads and what it reads by itself, in float64; nobody reads of the other group."""
    batch, pages = 6, 12
    q = random(batch, kv_heads * group, dim, dtype=dtype, seed=1)
    keys, values = (random((pages + 1) * PAGE_SIZE, kv_heads, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    grouping = grouping_of([((0, 3, 4), [7, 2]), ((2, 5), [9])], batch)
    own_pages, tails = [[1], [4, 5], [3], [], [8], [6, 10]], [1, 64, 63, 17, 40, 2]

    def slots(pages: list[int] | np.ndarray) -> torch.Tensor:
        return (torch.tensor(pages, dtype=torch.int64)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()

    own = [torch.cat((slots(some), slots([11])[:tail])) for some, tail in zip(own_pages, tails, strict=True)]
    together = [slots(some.tolist()) for some in grouping.pages]
    pruned = [place == 1 for place in range(batch)]
    out = attend_in_groups(q, keys, values, own, together, grouping, pruned, dim**-0.5)
    assert out.dtype == dtype
    for place in range(batch):
        group_of = next((g for g, some in enumerate(grouping.groups) if place in some.members), None)
        read = own[place] if group_of is None else torch.cat((together[group_of], own[place]))
        expected = naive(q[place : place + 1], keys[read], values[read], dim**-0.5)
        torch.testing.assert_close(out[place : place + 1].double(), expected, rtol=0, atol=TOLERANCE[dtype])
    alone = attend_in_float32(q[1:2], keys[own[1]], values[own[1]], dim**-0.5)
    assert torch.equal(out[1:2], alone), "a request in no group says what it said, to the bit"


def test_the_backend_decodes_in_groups() -> None:
    """From what requests chose to what they say: their tables, groups, slots, and attention, compared with attention to
    the pages that each is said to read; one of them reads everything, and two read pages that they did not choose."""
    pages, dim, kv_heads = 12, 16, 2
    keys, values = (random((pages + 1) * PAGE_SIZE, kv_heads, dim, dtype=torch.float32, seed=seed) for seed in (2, 3))
    ledger = Ledger(virtual_pages=pages, physical_pages=pages)
    ledger.v2p[1:] = np.random.default_rng(0).permutation(pages) + 1
    sets = ResidentSets(ResidentTable(6, pages, PAGE_SIZE), ledger)
    req_to_token, memory = torch.zeros(6, 8 * PAGE_SIZE, dtype=torch.int32), [1, 2, 3, 4, 5]
    chosen = [([0, 2], 5, 20), ([0, 3], 5, 64), ([], 0, 1), ([2, 3], 5, 63)]
    requests, lengths = [], []
    for number, (positions, tail_start, more) in enumerate(chosen):
        request = Request(f"r{number}", number + 1, Asked("quest", 0.5), prompt_tokens=5 * PAGE_SIZE + 3)
        request.pages = np.array([*memory, 6 + number], dtype=np.int64)
        slots = (torch.from_numpy(request.pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
        req_to_token[request.row, : len(slots)] = slots
        sets.enter(request.row)
        sets.remap(request, np.array(positions, dtype=np.int64), tail_start)
        requests.append(request)
        lengths.append(5 * PAGE_SIZE + more)
    grouping = Groups(sets, GroupRules(least_saved=0.5)).of(requests)
    assert grouping is not None and grouping.groups[0].members == (0, 1, 3)
    assert grouping.groups[0].positions.tolist() == [0, 2, 3] and grouping.groups[0].added_reads == 3

    batch = Batch(DECODE, tuple(request.key for request in requests), tuple(lengths), tuple(n - 1 for n in lengths))
    step = Step.of(batch, requests, grouping=grouping)
    backend = backend_of(sets, ledger, req_to_token, (keys, values), step)
    forward = decoding(requests, lengths)
    backend.init_forward_metadata(forward)
    q = random(4, 2 * kv_heads, dim, dtype=torch.float32, seed=1)
    layer = SimpleNamespace(layer_id=0, tp_q_head_num=4, qk_head_dim=dim, v_head_dim=dim, scaling=dim**-0.5)
    out = backend.forward_decode(q.flatten(1), None, None, layer, forward, save_kv_cache=False)
    for place, request in enumerate(requests):
        read = sorted({*chosen[place][0], *([0, 2, 3] if place != 2 else range(5))})
        tail = torch.arange(lengths[place] - 5 * PAGE_SIZE) + int(ledger.v2p[request.pages[5]]) * PAGE_SIZE
        physical = torch.from_numpy(ledger.v2p[request.pages[read]])
        slots = torch.cat(((physical[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten(), tail))
        expected = naive(q[place : place + 1], keys[slots], values[slots], dim**-0.5)
        seen = out[place].view(1, 4, dim).double()
        torch.testing.assert_close(seen, expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_the_future_cannot_be_seen() -> None:
    q, keys = random(6, 2, 16, dtype=torch.float32, seed=1), random(20, 2, 16, dtype=torch.float32, seed=2)
    values = random(20, 2, 16, dtype=torch.float32, seed=3)
    before = attend(q, keys, values, 0.25)
    keys[17], values[17] = math.pi, 1e6  # the token of query 3
    after = attend(q, keys, values, 0.25)
    assert torch.equal(before[:3], after[:3])
    assert (before[3:] != after[3:]).any(dim=-1).all()


@pytest.mark.parametrize(("n", "length"), [(5, 17), (QUERY_BLOCK + 40, QUERY_BLOCK + 100)])
def test_chunks_give_what_the_whole_prompt_gives(n: int, length: int) -> None:
    """Prefill is exact however it is cut."""
    tensors = [random(length, 2, 16, dtype=torch.float32, seed=seed) for seed in (1, 2, 3)]
    q, keys, values = tensors
    whole = attend(q, keys, values, 0.25)
    first = attend(q[: length - n], keys[: length - n], values[: length - n], 0.25)
    second = attend(q[length - n :], keys, values, 0.25)
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=0, atol=TOLERANCE[torch.float32])


# --- parts that can be merged ----------------------------------------------------------------------------------------


def naive_part(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and base-2 log-sum-exps, float64."""
    group = q.shape[1] // keys.shape[1]
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
    logits = torch.einsum("nhd,mhd->nhm", q.double(), k) * scale
    if causal:
        future = torch.ones(len(q), len(keys), dtype=torch.bool).triu(1)
        logits = logits.masked_fill(future[:, None], -math.inf)
    return torch.einsum("nhm,mhd->nhd", torch.softmax(logits, dim=-1), v), torch.logsumexp(logits, -1) / math.log(2)


PARTS = [
    # queries, keys, causal
    pytest.param(1, 1, False, id="1 key"),
    pytest.param(1, 200, False, id="1 query"),
    pytest.param(7, 64, False, id="a page"),
    pytest.param(70, 33, False, id="more queries than keys"),
    pytest.param(1, 1, True, id="causal, 1 token"),
    pytest.param(7, 7, True, id="causal, 7 tokens"),
    pytest.param(700, 700, True, id="causal, blocks"),
]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), HEADS)
@pytest.mark.parametrize(("n", "m", "causal"), PARTS)
def test_attend_part(n: int, m: int, causal: bool, kv_heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    q = random(n, kv_heads * group, dim, dtype=dtype, seed=1)
    keys, values = (random(m, kv_heads, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    out, lse = attend_part(q, keys, values, dim**-0.5, causal)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:2], torch.float32)
    assert lse.is_contiguous()
    expected, expected_lse = naive_part(q, keys, values, dim**-0.5, causal)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=TOLERANCE[dtype])


def test_log_sum_exps_are_base_2() -> None:
    """Of eight keys that the query does not care for, the sum is eight: three bits."""
    q, keys = torch.zeros(2, 4, 16), torch.ones(8, 2, 16)
    out, lse = attend_part(q, keys, torch.full_like(keys, 2.5), 0.25)
    torch.testing.assert_close(lse, torch.full((2, 4), 3.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(out, torch.full((2, 4, 16), 2.5), rtol=0, atol=1e-6)


def test_a_part_need_not_be_contiguous() -> None:
    """Staged keys and values are halves of one buffer; pages in place are gathered."""
    q, both = random(5, 4, 16, dtype=torch.float32, seed=1), random(12, 2, 2, 16, dtype=torch.float32, seed=2)
    keys, values = both[:, 0], both[:, 1]
    assert not keys.is_contiguous()
    strided = attend_part(q, keys, values, 0.25)
    plain = attend_part(q, keys.contiguous(), values.contiguous(), 0.25)
    assert torch.equal(strided[0], plain[0]) and torch.equal(strided[1], plain[1])


def test_a_part_of_another_type_is_read_in_the_type_of_the_queries() -> None:
    q = random(5, 2, 16, dtype=torch.float32, seed=1)
    keys, values = (random(12, 2, 16, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    out, lse = attend_part(q, keys, values, 0.25)
    expected = naive_part(q, keys, values, 0.25, False)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=TOLERANCE[torch.float32])
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=TOLERANCE[torch.float32])


CUTS = [
    # tokens of each part before the chunk
    pytest.param([], id="no prefix"),
    pytest.param([64], id="one part"),
    pytest.param([64, 64, 10], id="blocks and a rest"),
    pytest.param([1] * 9, id="single tokens"),
]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), HEADS)
@pytest.mark.parametrize("cuts", CUTS)
def test_merged_parts_are_attention_over_all_keys(
    cuts: list[int], kv_heads: int, group: int, dim: int, dtype: torch.dtype
) -> None:
    n, prefix = 9, sum(cuts)
    q = random(n, kv_heads * group, dim, dtype=dtype, seed=1)
    keys, values = (random(prefix + n, kv_heads, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    out, lse = attend_part(q, keys[prefix:], values[prefix:], dim**-0.5, causal=True)
    out = out.float()
    start = 0
    for tokens in cuts:
        part = slice(start, start + tokens)
        merge_states(out, lse, *attend_part(q, keys[part], values[part], dim**-0.5))
        start += tokens
    for whole in (attend(q, keys, values, dim**-0.5), naive(q, keys, values, dim**-0.5)):
        torch.testing.assert_close(out.double(), whole.double(), rtol=0, atol=TOLERANCE[dtype])


# --- a streamed chunk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "streamed"),
    [
        pytest.param([], [0, 1, 2, 3, 4], id="all streamed"),
        pytest.param([0, 1, 2, 3, 4], [], id="all in place"),
        pytest.param([1, 4], [0, 2, 3], id="some of both"),
        pytest.param([], [], id="no prefix"),
    ],
)
def test_a_streamed_chunk_reads_all_tokens_before_it(here: list[int], streamed: list[int]) -> None:
    """As the backend computes it: its own tokens, then pages in place, then pages of the mirror, two at a time."""
    kv_heads, heads, dim, layers, count = 2, 4, 16, 3, len(here) + len(streamed)
    before = count * PAGE_SIZE
    tokens = before + 40
    q = random(40, heads, dim, dtype=torch.float32, seed=1)
    content = random(layers, 2, tokens, kv_heads, dim, dtype=torch.float32, seed=2)

    # Page i of the prefix is virtual page i + 1; in place, at physical page i + 2, or in the mirror. The rest is NaN.
    pool = torch.full((layers, 2, 10 * PAGE_SIZE, kv_heads, dim), math.nan)
    mirror = torch.full((count + 1, layers, 2, PAGE_SIZE, kv_heads, dim), math.nan)
    v2p = np.zeros(count + 1, dtype=np.int64)
    for page in here:
        v2p[page + 1] = page + 2
        pool[:, :, (page + 2) * PAGE_SIZE :][:, :, :PAGE_SIZE] = content[:, :, page * PAGE_SIZE :][:, :, :PAGE_SIZE]
    for page in streamed:
        mirror[page + 1] = content[:, :, page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    pool[:, :, PAGE_SIZE : PAGE_SIZE + 40] = content[:, :, before:]
    masks = [np.isin(np.arange(count), part) for part in (here, streamed)]
    reading = Reading.of(np.arange(1, count + 1), before, *masks, PAGE_SIZE)

    backend = object.__new__(LSATorchBackend)  # SGLang's part of it needs a model runner
    layout = MhaLayout(list(pool[:, 0]), list(pool[:, 1]), PAGE_SIZE)
    pages = mirror.flatten(1).view(torch.uint8)
    staging = Staging(layout, pages, 2, lambda: pytest.fail("no stream on a CPU"))
    backend.lsa = SimpleNamespace(step=Step(staged=staging.read(reading.streamed)))
    backend.slots = [torch.cat((reading.slots(v2p), torch.arange(PAGE_SIZE, PAGE_SIZE + 40)))]
    for layer in range(layers):
        out = backend._attend_streamed(q, *pool[layer], SimpleNamespace(layer_id=layer, scaling=dim**-0.5))
        assert out.dtype == torch.float32
        whole = attend(q, *content[layer], dim**-0.5)
        torch.testing.assert_close(out, whole, rtol=0, atol=TOLERANCE[torch.float32])
