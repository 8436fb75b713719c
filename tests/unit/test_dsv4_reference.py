"""The reference of the GPU tests of DeepSeek-V4 says what it should: its mask and its order, on a CPU."""

from __future__ import annotations

import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dsv4_plugin import ENTRIES, Mask, in_order, set_in_force
from dsv4_scores import Witness
from dsv4_servers import Difference, Noise, Said
from sglang.srt.layers.attention.dsv4.indexer import topk_transform_512_pytorch_vectorized

from sglang_lsa.engine.native_index import NativeIndex
from sglang_lsa.engine.observe_index import IndexRings, KeptIndexKeys
from sglang_lsa.engine.policies import Native, Retriever
from sglang_lsa.indexer.flashmemory import Retriever as Layer
from sglang_lsa.kernels.retriever_score_paged import pack_pages

SETS = "4001:15:0,2,4,6,8,9,10,11,12;4010:15:1,3"
"""Of a prompt of 4,000 tokens: 15 complete pages and a tail."""


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(4000, None), (4001, (15, [0, 2, 4, 6, 8, 9, 10, 11, 12])), (4010, (15, [1, 3])), (9000, (15, [1, 3]))],
)
def test_set_in_force(tokens: int, expected: tuple[int, list[int]] | None) -> None:
    assert set_in_force({"lsa": {"sets": SETS}}, tokens) == expected


def test_who_names_no_set_reads_everything() -> None:
    assert all(set_in_force(given, 5) is None for given in (None, {}, {"lsa": {"budget": 1.0}}))


def batch(decode: bool, *asked: tuple[int, str]) -> SimpleNamespace:
    reqs = [
        SimpleNamespace(sampling_params=SimpleNamespace(custom_params={"lsa": {"sets": sets}})) for _, sets in asked
    ]
    mode = SimpleNamespace(is_decode=lambda: decode)
    return SimpleNamespace(forward_mode=mode, seq_lens_cpu=torch.tensor([tokens for tokens, _ in asked]), reqs=reqs)


def test_the_mask_hides_pages_of_decode_steps_alone() -> None:
    mask, logits = Mask(), torch.zeros(3, 16 * ENTRIES)
    mask.note(batch(False, (4001, SETS)))
    assert mask.apply(logits) is logits
    mask.note(batch(True, (4001, SETS), (4001, ""), (4096, SETS)))
    seen = mask.apply(logits).view(3, 16, ENTRIES) == 0
    assert seen.sum(2)[0].tolist() == [64, 0, 64, 0, 64, 0, 64, 0, 64, 64, 64, 64, 64, 0, 0, 40]
    assert seen.sum(2)[1].tolist() == [64] * 15 + [40]
    assert seen.sum(2)[2].tolist() == [0, 64, 0, 64, *[0] * 11, 64]


@pytest.mark.parametrize("tokens", [4001, 4012], ids=["more than the top-k", "fewer"])
def test_mask_and_compact_table_give_the_same_order(tokens: int) -> None:
    """What attention adds up, and in which order: the bits of a server with LSA can be those of the reference."""
    mask, select = Mask(), in_order(topk_transform_512_pytorch_vectorized)
    logits = torch.randn((1, 20 * ENTRIES), generator=torch.Generator().manual_seed(0))
    mask.note(batch(True, (tokens, SETS)))
    tail_start, positions = mask.seen[0] or (0, [])
    read = [*positions, *range(tail_start, 20)]
    entries, kept = torch.tensor([tokens // 4]), torch.tensor([64 * (len(positions) - tail_start) + tokens // 4])
    pages = torch.arange(20, dtype=torch.int32)[None] + 100
    compact = pages[:, read]
    compact_logits = logits.view(1, 20, ENTRIES)[:, read].flatten(1)
    found = []
    for scores, length, table in ((mask.apply(logits), entries, pages), (compact_logits, kept, compact)):
        slots, raw = torch.full((1, 512), -7, dtype=torch.int32), torch.full((1, 512), -7, dtype=torch.int32)
        select(scores, length, table, slots, ENTRIES, raw)
        assert torch.equal(slots < 0, raw < 0)
        found.append(slots)
    assert torch.equal(found[0], found[1])
    assert int((found[0] >= 0).sum()) == min(512, int(kept))


def said(tokens: list[int], shift: float = 0.0) -> Said:
    return Said(tuple(tokens), tuple({token: -0.5 + shift, 99: -1.0 + shift} for token in tokens), 0)


def test_differences_end_where_answers_part() -> None:
    assert Difference.between(said([1, 2]), said([1, 2])) == Difference(2, 2, 0.0, 0.0, 0.0)
    parted = Difference.between(said([1, 2, 3]), said([1, 99, 7], 0.25))
    assert (parted.equal, parted.gap) == (1, 0.5)
    assert Difference.between(said([1]), said([1], float("nan"))).mean == float("inf")


def test_noise_decides() -> None:
    noise = Noise(repeated=0.005, together=0.01, ordered=0.0)
    noise.check("within", said([1, 2]), said([1, 2], 0.02), "together")
    for seen, of in ((0.03, "together"), (0.02, "repeated"), (0.002, "ordered"), (float("nan"), "together")):
        with pytest.raises(AssertionError):
            noise.check("beyond", said([1, 2]), said([1, 2], seen), of)


class Scored:
    """Two layers with an index, ten complete pages, and a request of which five tokens are noted."""

    def __init__(self, path: pathlib.Path):
        draw = torch.Generator().manual_seed(0)
        index = NativeIndex((1, 3), heads=2, head_dim=128, hidden=8, dtype=torch.bfloat16)
        self.rings = IndexRings(3, 4, index.layers, index, True, True, "cpu")
        pools = {layer: pack_pages(torch.randn((11, 64, 128), generator=draw)) for layer in index.layers}
        self.keys = KeptIndexKeys(20, pools, index.layers)
        self.pages, physical = np.arange(3, 13), np.arange(1, 11)
        self.keys.complete(self.pages, physical)
        mirror = torch.zeros((21, 2 * 8448), dtype=torch.uint8)
        mirror[3:13] = torch.cat([pools[layer][1:] for layer in index.layers], dim=1)
        pieces = {layer: (None, SimpleNamespace(offset=8448 * n, nbytes=8448)) for n, layer in enumerate(index.layers)}
        self.witness = Witness(path)
        self.witness.pager = SimpleNamespace(
            layout=SimpleNamespace(by_layer=pieces), mirror=SimpleNamespace(pages=mirror)
        )
        mode = SimpleNamespace(is_decode=lambda: False)
        given = SimpleNamespace(forward_mode=mode, req_pool_indices=torch.tensor([2]), extend_seq_lens_cpu=[5])
        rows, positions = torch.full((5,), 2), torch.arange(2600, 2605)
        self.rings.begin(rows, positions)
        self.witness.begin(positions, given)
        for layer in index.layers:
            x = torch.randn((5, 8), generator=draw).bfloat16()
            q = torch.randn((5, 2, 128), generator=draw).to(torch.float8_e4m3fn)
            self.rings.capture_hidden(layer, x)
            self.rings.capture_index_query(layer, q, torch.randn((5, 2, 1), generator=draw))
            self.witness.keep(self.witness.entered, layer, x)
            self.witness.keep(self.witness.asked, layer, q.view(torch.uint8).flatten(1))
        self.request = SimpleNamespace(row=2, rid="r", first_observed=0, tokens=2605)
        self.layers = [
            Layer(*(torch.randn(shape, generator=draw).bfloat16() for shape in ((4, 8), (256, 4), (4,), (2, 8))))
            for _ in index.layers
        ]

    def look(self, name: str) -> dict:
        policy = Native(self.rings, self.keys) if name == "native" else Retriever(self.layers, self.rings, self.keys)
        self.witness.look(policy, self.request, self.pages, policy.score(self.request, self.pages))
        return json.loads(self.witness.path.read_text().splitlines()[-1])


@pytest.mark.parametrize("policy", ["native", "retriever"])
def test_the_witness_finds_what_is_right_and_what_is_not(policy: str, tmp_path: pathlib.Path) -> None:
    scored = Scored(tmp_path / "scores")
    line = scored.look(policy)
    assert (line["inputs"], line["missing"], line["keys"], line["positions"], line["pages"]) == (True, 0, True, 4, 10)
    assert line["far"] == 0.0
    assert line["best_shared"] >= 2 / 3
    ring = scored.rings._queries if policy == "native" else scored.rings._hidden
    ring[2] += 1
    assert not scored.look(policy)["inputs"]
    scored.keys.tables[1][5] += 1
    assert not scored.look(policy)["keys"]
    scored.request.tokens = 2606
    assert scored.look(policy)["missing"] == 2
