"""The reference of the GPU tests of DeepSeek-V4 says what it should: its mask and its order, on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from dsv4_plugin import ENTRIES, Mask, in_order, set_in_force
from dsv4_servers import Difference, Noise, Said
from sglang.srt.layers.attention.dsv4.indexer import topk_transform_512_pytorch_vectorized

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
    noise = Noise(repeated=0.0, together=0.01)
    noise.check("within", said([1, 2]), said([1, 2], 0.02))
    for seen in (said([1, 2], 0.03), said([1, 2], float("nan"))):
        with pytest.raises(AssertionError):
            noise.check("beyond", said([1, 2]), seen)
