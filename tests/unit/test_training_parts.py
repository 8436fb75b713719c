"""What training is made of, on recordings made here: labels, towers, keys of pages, scores, losses."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("sentence_transformers")

from made_recordings import BLOCKS, PAGES, QUICK, SEEKER, SHAPE, one_thread_only, write_all

from sglang_lsa.indexer.checkpoint import IndexerConfig
from sglang_lsa.indexer.model import MemoryIndexer, slow_dimensions
from sglang_lsa.indexer.recording import BLOCK
from sglang_lsa.kernels.page_score import from_8_bits, to_8_bits
from sglang_lsa.training.data import Batches, load_recordings
from sglang_lsa.training.losses import LOSSES, PageLoss
from sglang_lsa.training.towers import as_sentence_transformer, scores
from sglang_lsa.training.train import config_for


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_thread_only():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_all(tmp_path_factory.mktemp("recordings"))


def test_labels_are_means_over_heads_of_the_largest_mass(data: pathlib.Path) -> None:
    heads = [(1, 0), SEEKER, (3, 5)]
    (recording, *_) = load_recordings(data, "held-out", heads)
    assert list(recording.anchors) == list(range(BLOCKS))
    for anchor, blocks in ((2, slice(2, 6)), (6, slice(6, 8))):
        pages = PAGES + (anchor * BLOCK) // 64
        expected = recording.mass[blocks, :, :pages].float().amax(0).mean(0)
        torch.testing.assert_close(recording.label(anchor), expected)
    torch.testing.assert_close(recording.past(2), recording.mass[:2, :, :PAGES].float().amax(0).mean(0))
    assert recording.past(0).tolist() == [0.0] * PAGES


def test_towers_in_training_score_like_the_served_ones(data: pathlib.Path) -> None:
    """Padding beside a longer document does not matter, and pages may lie anywhere in the table."""
    recordings = load_recordings(data, "held-out", [(1, 1), (1, 5), SEEKER])
    torch.manual_seed(0)
    indexer = MemoryIndexer(config_for(recordings[0], [(1, 1), (1, 5), SEEKER], QUICK))
    for value in indexer.parameters():
        torch.nn.init.normal_(value, std=0.5)
    model = as_sentence_transformer(indexer, "cpu")
    batch = Batches(recordings, 16, 3, seed=1)([{"query": 0, "document": 0}, {"query": 1, "document": 1}])
    assert batch["label"].shape == (2, 3, PAGES + 2)
    parts = [{"input_features": batch[f"{name}_input_features"], "task": name} for name in ("query", "document")]
    with torch.no_grad():
        queries, pages = (model(part) for part in parts)
        learned = scores(indexer, queries, pages, batch["label"])
        for document in range(2):
            keys = indexer.keys_of_runs(recordings[document].runs)
            places = torch.randperm(99)[: len(keys)] + 1
            table = torch.full((100, *keys.shape[1:]), 127, dtype=torch.uint8)  # NaN
            table[places] = to_8_bits(keys)
            for anchor in range(3):
                known = int((batch["label"][document, anchor] >= 0).sum())
                served = indexer.score(batch["query_input_features"][document][anchor], table, places[:known])
                torch.testing.assert_close(learned[document, anchor, :known], served)
                assert (learned[document, anchor, known:] == 0).all()


def test_keys_of_a_page_are_means_of_its_tokens() -> None:
    config = IndexerConfig(SHAPE, ((1, 0), (1, 5), (3, 4)), sub_keys=4, key_dim=8)
    assert config.layers == (1, 3)
    assert config.key_heads == ((1, 0), (1, 1), (3, 1))
    indexer = MemoryIndexer(config)
    keys = torch.randn((3, 64, 2, SHAPE.kv_heads, 16))
    made = indexer.page_keys(keys)
    assert made.shape == (3, 3, 4, 8)
    for slot, (layer, head) in enumerate(((0, 0), (0, 1), (1, 1))):
        means = keys[:, :, layer, head].view(3, 4, 16, 16).mean(2)[..., [4, 5, 6, 7, 12, 13, 14, 15]]
        torch.testing.assert_close(made[:, slot], from_8_bits(to_8_bits(means)))


def test_slow_dimensions() -> None:
    assert slow_dimensions(8, 4) == [2, 3, 6, 7]
    assert slow_dimensions(8, 8) == list(range(8))


def test_age_and_neighbours_add_to_a_score() -> None:
    indexer = MemoryIndexer(IndexerConfig(SHAPE, (SEEKER,), key_dim=8))
    with torch.no_grad():
        indexer.neighbour.copy_(torch.tensor([0.5, 0.25]).exp().sub(1).log())
        indexer.age.fill_(-100.0)
        indexer.age[1] = torch.tensor(2.0).exp().sub(1).log()
        worth = indexer.combine(torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(worth, torch.tensor([0.0, 0.25, 1.0, 2.5, 2.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_prefer_the_truth(name: str) -> None:
    mass = torch.tensor([[0.8, 0.0, 0.05, -1.0], [0.0, 0.5, 0.4, 0.0]])
    right = mass.clamp(min=0.001)
    loss = LOSSES[name]
    assert loss(right, mass, 0.2) < loss(torch.full_like(right, 0.2), mass, 0.2) < loss(0.8 - right, mass, 0.2)
    changed = right.clone()
    changed[0, 3] = 0.9  # no page there
    assert loss(changed, mass, 0.2) == loss(right, mass, 0.2)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_a_needed_page_are_finite(name: str) -> None:
    mass = torch.tensor([[0.0, 0.01, -1.0]])
    score = torch.zeros((1, 3), requires_grad=True)
    loss = LOSSES[name](score, mass, 0.2)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(score.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_reach_every_parameter(name: str, data: pathlib.Path) -> None:
    """Through both towers, from an indexer as it is before training."""
    recordings = load_recordings(data, "held-out", [SEEKER])
    indexer = MemoryIndexer(config_for(recordings[0], [SEEKER], QUICK))
    batches = Batches(recordings, QUICK.positions, 3)
    batch = batches(batches.rows()[:3])
    parts = [{"input_features": batch[f"{side}_input_features"], "task": side} for side in ("query", "document")]
    PageLoss(as_sentence_transformer(indexer, "cpu"), indexer, name, 0.3)(parts, batch["label"]).backward()
    for parameter, value in indexer.named_parameters():
        assert value.grad is not None and torch.isfinite(value.grad).all(), parameter
        assert value.grad.abs().sum() > 0, parameter


def test_evidence_counts_where_the_whole_answer_lies_ahead(data: pathlib.Path) -> None:
    known = load_recordings(data, "held-out", [SEEKER])[0]
    evidence = list(known.entry.evidence)
    for answer, asked in ((64, {4}), (48, {4, 5}), (80, set())):  # of 128 recorded tokens, which begin at block 0
        recording = dataclasses.replace(known, entry=dataclasses.replace(known.entry, answer_tokens=answer))
        for block in range(BLOCKS):
            label, wanted = recording.label(block), recording.wanted(block, 0.5)
            ahead = block in asked
            assert torch.equal(wanted[evidence], label[evidence].clamp(min=0.5) if ahead else label[evidence])
            others = [page for page in range(len(label)) if page not in evidence]
            assert torch.equal(wanted[others], label[others])
            assert torch.equal(recording.wanted(block, 0.0), label)
    batches = Batches([dataclasses.replace(known, entry=dataclasses.replace(known.entry, answer_tokens=64))], 16, 6)
    batches.evidence = 0.9
    assert int((batches(batches.rows())["label"] == 0.9).sum()) >= len(evidence) - 1
