"""observe and score for a model with an index of its own: rings of queries and hidden states, keys of all pages."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine import build, native_index
from sglang_lsa.engine.native_index import NativeIndex, scorer_layers
from sglang_lsa.engine.observe_index import IndexRings, KeptIndexKeys
from sglang_lsa.engine.policies.native import shares
from sglang_lsa.engine.policies.retriever import worth
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.sizing_dsv4 import dsv4_needs
from sglang_lsa.indexer.flashmemory import NAMES, load_retrievers
from sglang_lsa.kernels.retriever_score_paged import ENTRIES, entry_logits, pack_pages, unpack_pages
from sglang_lsa.memory.layout.dsv4 import INDEX_ROW, KV_ROW, Dsv4Layout
from sglang_lsa.memory.pager import Pager

HEADS, HIDDEN = 4, 16
LAYERS = (1, 3, 5)
INDEX = NativeIndex(LAYERS, HEADS, 128, HIDDEN, torch.float32)
FLASH = NativeIndex(tuple(range(2, 43, 2)), 64, 128, 4096, torch.bfloat16)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layout(pages: int = 8) -> Dsv4Layout:
    rows = {layer: pack_pages(random(pages + 1, ENTRIES, 128, seed=layer)).to(torch.uint8) for layer in LAYERS}
    return Dsv4Layout({layer: torch.zeros((pages + 1, KV_ROW), dtype=torch.uint8) for layer in LAYERS}, rows)


def rings(positions: int = 4, hidden: bool = True) -> IndexRings:
    return IndexRings(5, positions, (1, 5), INDEX, hidden, True, "cpu")


def asked(layer: int, row: int, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden state, query and weights of a token: others for each."""
    seed = (layer * 10 + row) * 1000 + position
    query = random(HEADS, 128, seed=seed + 1).to(torch.float8_e4m3fn)
    return random(HIDDEN, seed=seed), query, random(HEADS, seed=seed).abs()


def run(observer: IndexRings, tokens: list[tuple[int, int]]) -> None:
    """A forward pass that computes these (row, position)."""
    rows, positions = (torch.tensor(part) for part in zip(*tokens, strict=True))
    observer.begin(rows, positions)
    for layer in LAYERS:
        hidden, q, weights = (
            torch.stack(part) for part in zip(*[asked(layer, *token) for token in tokens], strict=True)
        )
        observer.capture_hidden(layer, hidden)
        observer.capture_index_query(layer, q, weights[..., None])


def assert_seen(observer: IndexRings, row: int, first: int, length: int) -> None:
    at = observer.recent(first, length)
    assert at.tolist() == list(range(max(first, length - observer.positions), length))
    hidden = observer.hidden(row, at)
    queries, weights = observer.queries(row, at)
    assert queries.shape == (len(at), 2, HEADS, 128) and weights.shape == (len(at), 2, HEADS)
    for n, position in enumerate(at.tolist()):
        for slot, layer in enumerate((1, 5)):
            x, q, w = asked(layer, row, position)
            assert torch.equal(hidden[n, slot], x)
            assert torch.equal(queries[n, slot], q.view(torch.uint8))
            assert torch.equal(weights[n, slot], w)


# --- rings -----------------------------------------------------------------------------------------------------------


def test_a_long_prompt_leaves_its_last_tokens_and_decode_goes_on() -> None:
    observer = rings()
    run(observer, [(2, position) for position in range(100, 111)])
    assert_seen(observer, 2, 100, 111)
    run(observer, [(2, 111)])
    assert_seen(observer, 2, 100, 112)


def test_requests_of_a_pass_do_not_meet() -> None:
    """One prompt longer than the ring, one that decodes, one short prompt, and padding."""
    observer = rings()
    run(observer, [*((3, p) for p in range(9)), (1, 77), *((4, p) for p in range(2)), (0, 0), (0, 0)])
    assert_seen(observer, 3, 0, 9)
    assert_seen(observer, 1, 77, 78)
    assert_seen(observer, 4, 0, 2)


def test_only_what_was_seen_since_admission_counts() -> None:
    observer = rings()
    run(observer, [(1, position) for position in range(4)])  # of whoever had the row before
    run(observer, [(1, 256), (1, 257)])
    assert_seen(observer, 1, 256, 258)


def test_tokens_beyond_those_of_the_pass_are_not_recorded() -> None:
    """SGLang may show more rows of a hidden state than the batch has tokens."""
    observer = rings()
    observer.begin(torch.tensor([1, 2]), torch.tensor([5, 6]))
    observer.capture_hidden(1, torch.ones((4, HIDDEN)))
    assert float(observer.hidden(1, torch.tensor([5]))[0, 0].sum()) == HIDDEN
    assert float(observer.hidden(0, torch.arange(4)).abs().sum()) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_decode_in_a_cuda_graph() -> None:
    """Replayed with other tokens it records those; an eager prompt in between changes nothing for the graph."""
    observer = IndexRings(5, 4, (1, 5), INDEX, True, True, "cuda")
    rows, positions = (torch.tensor(part, device="cuda") for part in ([1, 3, 0, 0], [7, 9, 0, 0]))
    hidden, queries, weights = (
        torch.zeros((4, *shape), device="cuda") for shape in ((HIDDEN,), (HEADS, 128), (HEADS, 1))
    )
    queries = queries.to(torch.float8_e4m3fn)

    def step() -> None:
        observer.begin(rows, positions.int())
        for layer in (1, 5):
            observer.capture_hidden(layer, hidden)
            observer.capture_index_query(layer, queries, weights)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(6):
        positions.add_(1)
        prompt = torch.arange(50, device="cuda")
        observer.begin(torch.full_like(prompt, 2), prompt)
        observer.capture_hidden(1, torch.ones((50, HIDDEN), device="cuda"))
        hidden.copy_(torch.randn_like(hidden))
        queries.copy_(torch.randn((4, HEADS, 128), device="cuda").to(torch.float8_e4m3fn))
        weights.copy_(torch.randn_like(weights))
        graph.replay()
        for index, row in enumerate((1, 3)):
            at = positions[index : index + 1]
            assert torch.equal(observer.hidden(row, at)[0], hidden[index].expand(2, -1))
            seen, of_heads = observer.queries(row, at)
            assert torch.equal(seen[0], queries[index].view(torch.uint8).expand(2, -1, -1))
            assert torch.equal(of_heads[0], weights[index, :, 0].expand(2, -1))
        assert bool((observer.hidden(2, torch.arange(46, 50, device="cuda"))[:, 0] == 1).all())


def test_what_is_kept() -> None:
    observer = rings(hidden=False)
    assert [observer.wants_query(layer) for layer in LAYERS] == [True, False, True]
    assert not any(observer.wants_hidden(layer) for layer in LAYERS)
    run(observer, [(1, 0)])
    assert observer.nbytes == 5 * 4 * 2 * HEADS * 132
    assert rings().nbytes == observer.nbytes + 5 * 4 * 2 * HIDDEN * 4


def test_queries_of_another_type_are_refused() -> None:
    observer = rings()
    observer.begin(torch.tensor([1]), torch.tensor([5]))
    with pytest.raises(ValueError, match=r"index queries are torch\.uint8: only those in float8_e4m3fn"):
        observer.capture_index_query(1, torch.zeros((1, HEADS, 128), dtype=torch.uint8), torch.zeros((1, HEADS, 1)))


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_of_complete_pages_stay_when_their_page_is_used_again() -> None:
    pool = layout()
    keys = KeptIndexKeys(20, pool.index_buffers, (1, 5))
    before = {layer: buffer.clone() for layer, buffer in pool.index_buffers.items()}
    keys.complete(np.array([17, 3]), np.array([2, 8]))
    for buffer in pool.index_buffers.values():
        buffer.fill_(255)
    keys.complete(np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    for table, layer in zip(keys.tables, (1, 5), strict=True):
        assert torch.equal(table[[17, 3]], before[layer][[2, 8]])
        assert int(table.sum()) == int(table[[17, 3]].sum()), "others are untouched"
    assert keys.nbytes == 2 * 21 * INDEX_ROW


def test_pages_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"index keys of layer 1 are .* \(3, 4352\): only pages of 8448 bytes"):
        KeptIndexKeys(5, {1: torch.zeros((3, 4352), dtype=torch.uint8)}, (1,))


# --- which layers, and what that takes -------------------------------------------------------------------------------


def checkpoint(path: pathlib.Path, numbers: tuple[int, ...], heads: int = 4, hidden: int = HIDDEN) -> str:
    shapes = dict(zip(NAMES, ((8, hidden), (heads * 128, 8), (8,), (heads, hidden)), strict=True))
    state = {
        f"retrievers.l{number}.{name}": random(*shape, seed=number) * 0.5
        for number in numbers
        for name, shape in shapes.items()
    }
    torch.save(state, path)
    return str(path)


def test_layers_are_those_of_the_paper_or_of_the_checkpoint(tmp_path: pathlib.Path) -> None:
    assert scorer_layers(LSAConfig(), FLASH) == (22, 26, 42)
    assert scorer_layers(LSAConfig(), INDEX) == LAYERS
    config = LSAConfig(indexer=checkpoint(tmp_path / "c.pt", (0, 2)))
    assert scorer_layers(config, INDEX) == (1, 5)
    with pytest.raises(ValueError, match="is for layer 20 of those with an index, the model has 3"):
        scorer_layers(LSAConfig(indexer=checkpoint(tmp_path / "other.pt", (10, 12, 20))), INDEX)
    with pytest.raises(ValueError, match="leave the flag out"):
        scorer_layers(LSAConfig(indexer=config.indexer, observe_layers=(1,)), INDEX)


@pytest.mark.parametrize("trained", [False, True])
def test_the_plan_counts_what_is_taken(trained: bool, tmp_path: pathlib.Path) -> None:
    config = LSAConfig(indexer=checkpoint(tmp_path / "c.pt", (0, 2)) if trained else None)
    pager = Pager(layout(), 20)
    observer = build.observer(config, pager.layout, 5, 1, INDEX)
    keys = build.page_keys(config, pager, INDEX)
    assert observer.nbytes == 5 * native_index.row_bytes(config, INDEX)
    assert keys.nbytes == 21 * native_index.page_bytes(config, INDEX)
    found = build.policies(by_index(config), pager, observer, keys, 1.0, INDEX)
    assert list(found) == (["retriever"] if trained else []) + ["native", "recency", "random"]


def by_index(config: LSAConfig) -> LSAConfig:
    return LSAConfig(indexer=config.indexer, policy="native")


# --- policies --------------------------------------------------------------------------------------------------------


def scored(policy: str, tmp_path: pathlib.Path, tokens: int = 9) -> tuple[np.ndarray, IndexRings, KeptIndexKeys]:
    """Scores of 6 pages, that lie elsewhere in the pool than in virtual memory, by a request of row 2."""
    config = LSAConfig(indexer=checkpoint(tmp_path / "c.pt", (0, 1, 2)), policy=policy, query_tokens=4)
    pool = layout()
    pager = Pager(pool, 20)
    observer, keys = build.observer(config, pool, 5, 1, INDEX), build.page_keys(config, pager, INDEX)
    assert isinstance(observer, IndexRings) and isinstance(keys, KeptIndexKeys)
    run(observer, [(2, position) for position in range(3, tokens)])
    virtual = np.array([15, 2, 9, 20, 4, 1])
    keys.complete(virtual, np.array([3, 1, 7, 8, 2, 5]))
    chosen = build.policies(config, pager, observer, keys, 1.0, INDEX)[policy]
    request = Request("a", 2, Asked(policy, 0.5), first_observed=3, tokens=tokens)
    scores = chosen.score(request, virtual)
    assert isinstance(scores, torch.Tensor)
    assert len(chosen.score(request, virtual[:0])) == 0
    return scores.numpy(), observer, keys


def test_native_scores_are_those_of_what_was_asked(tmp_path: pathlib.Path) -> None:
    scores, _, keys = scored("native", tmp_path)
    votes = []
    for slot, layer in enumerate(LAYERS):
        numbers, scales = unpack_pages(keys.tables[slot][[15, 2, 9, 20, 4, 1]], torch.float64)
        for position in range(5, 9):
            _, q, w = asked(layer, 2, position)
            products = torch.einsum("hd,nkd->hnk", q.double(), numbers).clamp(min=0)
            best = (torch.einsum("hnk,h->nk", products, w.double()) * scales).amax(dim=1)
            votes.append(((best - best.mean()) / best.std(correction=0)).softmax(dim=0))
    np.testing.assert_allclose(scores, torch.stack(votes).amax(dim=0).numpy(), rtol=1e-4)


def test_retriever_scores_are_the_keys_that_are_needed(tmp_path: pathlib.Path) -> None:
    scores, _, keys = scored("retriever", tmp_path)
    expected = np.zeros(6)
    for slot, (layer, trained) in enumerate(zip(LAYERS, load_retrievers(tmp_path / "c.pt").values(), strict=True)):
        for position in range(5, 9):
            x, _, _ = asked(layer, 2, position)
            query, weights = trained(x.double()[None], torch.tensor([position]))
            logits = entry_logits(query, weights, keys.tables[slot][[15, 2, 9, 20, 4, 1]])[0]
            expected = np.maximum(expected, (worth(logits.amax(dim=1), (logits > 0).sum(dim=1))).numpy())
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert scores.max() > 1


def test_pages_keep_their_order_however_large_logits_are() -> None:
    """And all are worth something, so that a budget is filled though no key is needed."""
    best = torch.tensor([-1e9, -1000, -999, -90, -89, -17, -0.5, 0, 0.5, 17.5, 18, 18.5, 1000])
    found = worth(best, (best > 0).int())
    assert found.dtype is torch.float32
    assert (found.diff() > 0).all() and found[1] > 0 and found.isfinite().all()
    assert (worth(best, torch.full_like(best, 3)) < 4.001).all()
    assert worth(torch.tensor([-torch.inf, torch.inf]), torch.zeros(2)).tolist() == [0, 1]


def test_a_checkpoint_of_another_width_is_refused(tmp_path: pathlib.Path) -> None:
    config = LSAConfig(indexer=checkpoint(tmp_path / "c.pt", (0,), hidden=8), policy="retriever")
    pager = Pager(layout(), 20)
    parts = build.observer(config, pager.layout, 5, 1, INDEX), build.page_keys(config, pager, INDEX)
    with pytest.raises(ValueError, match="reads hidden states of 8 numbers, the model has 16"):
        build.policies(config, pager, *parts, 1.0, INDEX)


def test_what_a_checkpoint_takes_is_planned(tmp_path: pathlib.Path) -> None:
    config = LSAConfig(indexer=checkpoint(tmp_path / "c.pt", (0, 2)), policy="retriever")
    pager = Pager(layout(), 20)
    parts = build.observer(config, pager.layout, 5, 1, INDEX), build.page_keys(config, pager, INDEX)
    made = build.policies(config, pager, *parts, 1.0, INDEX)["retriever"]
    needs = dsv4_needs(config, INDEX, rows=5, context_tokens=4096, c128_layers=2)
    planned = [needs.overhead(config, 10 * 256, virtual * 256)["retriever"] for virtual in (20, 40)]
    assert planned == [made.nbytes] * 2 and made.nbytes > 0
    assert "retriever" not in dsv4_needs(LSAConfig(), INDEX, rows=5, context_tokens=4096, c128_layers=2).fixed_bytes


def test_a_vote_that_stands_out_counts_more_whatever_its_scale() -> None:
    flat, peaked = random(50, seed=1), random(50, seed=2)
    peaked[7] = 8.0
    found = shares(torch.stack((flat * 1000 + 5000, peaked * 1e-3 - 1)))
    assert int(found.argmax()) == 7 and float(found[7]) > 0.5
    torch.testing.assert_close(shares(torch.stack((flat, peaked))), found, rtol=1e-2, atol=1e-4)
    assert bool((found > 0).all())


def test_votes_for_nothing_in_particular() -> None:
    assert shares(torch.full((3, 5), 2.0)).tolist() == pytest.approx([0.2] * 5)
    assert shares(torch.zeros((0, 5))).tolist() == [0.0] * 5
    assert shares(torch.zeros((2, 1))).tolist() == [1.0]
