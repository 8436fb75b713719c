"""Recordings as training data: what to predict at each anchor, and batches of queries with pages to choose from."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.indexer.record import Entry, Manifest
from sglang_lsa.indexer.recording import BLOCK, BadRecording, Facts, read_recording
from sglang_lsa.pages import pages_complete, pages_spanned
from sglang_lsa.selection import always_kept, budget_pages

HORIZON = 64
"""Tokens after an anchor whose attention is to be predicted."""


@dataclass(frozen=True)
class Recording:
    """One document, with the attention of the chosen heads.

    Attributes:
        hidden: ``[tokens, layers, hidden]`` from position ``facts.first`` on.
        runs: ``[pages, layers, RUNS, hidden]``.
        mass: float16 ``[blocks, pages]``, the most that any chosen head paid in the block.
        quest, mean_key: float16 ``[blocks, pages]``.
    """

    entry: Entry
    facts: Facts
    hidden: torch.Tensor
    runs: torch.Tensor
    mass: torch.Tensor
    quest: torch.Tensor
    mean_key: torch.Tensor

    @property
    def anchors(self) -> range:
        """Blocks before which a set can be chosen, and whose next tokens are all recorded."""
        first = 0 if self.facts.start >= PAGE_SIZE else pages_spanned(PAGE_SIZE - self.facts.start) * PAGE_SIZE // BLOCK
        return range(first, len(self.mass) - HORIZON // BLOCK + 1)

    def position(self, anchor: int) -> int:
        """Tokens of the context before the anchor's block."""
        return self.facts.start + anchor * BLOCK

    def label(self, anchor: int) -> torch.Tensor:
        """The most that any head pays to each complete page in the next tokens, float32 ``[pages]``."""
        pages = pages_complete(self.position(anchor))
        return self.mass[anchor : anchor + HORIZON // BLOCK, :pages].amax(dim=0).float()

    def queries(self, anchor: int, positions: int) -> torch.Tensor:
        """Hidden states of the last tokens before the anchor, ``[positions, layers, hidden]``; the first repeats when
        there are fewer."""
        stop = self.position(anchor) - self.facts.first
        rows = torch.arange(stop - positions, stop).clamp(min=0)
        return self.hidden[rows]

    def free_pages(self, anchor: int, budget: float, least: int, sink: int, recent: int) -> np.ndarray:
        """Complete pages that are not kept in any case: bool ``[pages]``."""
        context = pages_spanned(self.position(anchor))
        kept = always_kept(context, budget_pages(context, budget, least), sink, recent)
        return ~kept[: pages_complete(self.position(anchor))]


def load_recordings(folder: pathlib.Path, split: str, heads: Sequence[int] | None = None) -> list[Recording]:
    """Load the recordings of one split.

    Args:
        heads: numbers (layer * q_heads + head) of the heads whose attention is to be predicted; None for all.

    Raises:
        BadRecording: a file is missing or damaged, the recordings do not fit each other, or there are none.
    """
    manifest = Manifest.open(folder)
    entries = [entry for entry in manifest.entries.values() if entry.split == split]
    if not entries:
        raise BadRecording(
            f"{folder} has no recordings of the split {split}: run sglang-lsa record with --splits {split}"
        )
    found: list[Recording] = []
    for entry in tqdm(entries, desc=f"loading {split}", unit="recording", leave=False):
        facts, tensors = read_recording(manifest.file(entry.name))
        mass = tensors["mass"]
        if heads is not None:
            mass = mass[:, list(heads)]
        recording = Recording(
            entry,
            facts,
            tensors["hidden"],
            tensors["runs"],
            mass.amax(dim=1)[:, : len(tensors["runs"])],
            tensors["quest"],
            tensors["mean_key"],
        )
        if found and _shape(recording) != _shape(found[0]):
            raise BadRecording(
                f"{manifest.file(entry.name)} is of (layers, width, model layers) {_shape(recording)}, "
                f"others of {_shape(found[0])}: record into separate folders"
            )
        if len(recording.anchors):
            found.append(recording)
    if not found:
        raise BadRecording(
            f"{folder}: no recording of {split} has {HORIZON} tokens after a page: record longer prompts"
        )
    return found


def _shape(recording: Recording) -> tuple[Any, ...]:
    return recording.facts.layers, recording.hidden.shape[-1], recording.facts.model_layers


def retrieval_heads(folder: pathlib.Path, count: int) -> list[int]:
    """The heads that pay most attention to the evidence of an answer while it is given, best first.

    Only training prompts with known evidence count. This is the retrieval score of Wu et al. (arXiv 2404.15574) with
    attention mass on pages in place of copied tokens.

    Raises:
        BadRecording: there are none.
    """
    manifest = Manifest.open(folder)
    entries = [e for e in manifest.entries.values() if e.split == "train" and e.evidence and e.answer_tokens]
    if not entries:
        raise BadRecording(f"{folder} has no training prompts with known evidence: record some, or use all heads")
    total: torch.Tensor | None = None
    for entry in tqdm(entries, desc="looking for retrieval heads", unit="recording", leave=False):
        facts, tensors = read_recording(manifest.file(entry.name), ("mass",))
        mass = tensors["mass"].float()
        first = max(0, (entry.tokens - entry.answer_tokens - facts.start) // BLOCK)
        last = -(-(entry.tokens - facts.start) // BLOCK)
        evidence = [page for page in entry.evidence if page < mass.shape[2]]
        if first < min(last, len(mass)) and evidence:
            share = mass[first:last, :, evidence].amax(dim=2).mean(dim=0)
            total = share if total is None else total + share
    if total is None:
        raise BadRecording(f"{folder}: answers lie before what was recorded: record with a larger --last")
    return total.topk(min(count, len(total))).indices.tolist()


class Batches:
    """Turns rows ``{"query": recording, "document": anchor}`` into tensors: the collator of the trainer.

    Every query comes with pages of its own document: its positives, hard negatives (pages that a training-free policy
    would choose and no head needs), and others at random.

    Args:
        positions: recent tokens that vote.
        pages: pages per query.
        golden: label from which on a page is a positive.
    """

    def __init__(self, recordings: Sequence[Recording], positions: int, pages: int, golden: float, seed: int = 0):
        self.recordings, self.positions, self.pages, self.golden = recordings, positions, pages, golden
        self.rng = np.random.default_rng(seed)
        self.valid_label_columns = ["label"]

    def rows(self) -> list[dict[str, int]]:
        return [
            {"query": number, "document": anchor}
            for number, recording in enumerate(self.recordings)
            for anchor in recording.anchors
        ]

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        """Returns ``query_input_features [batch, positions, layers, hidden]``, ``document_input_features
        [batch, pages, layers, RUNS, hidden]`` and ``label [batch, pages]``, -1 where there is no page."""
        queries, documents, labels = [], [], []
        for row in rows:
            recording, anchor = self.recordings[row["query"]], row["document"]
            label = recording.label(anchor)
            chosen = torch.from_numpy(self._draw(recording, anchor, label.numpy()))
            runs, known = recording.runs[chosen], label[chosen]
            missing = self.pages - len(chosen)
            if missing:
                runs = torch.cat((runs, runs[:1].expand(missing, *runs.shape[1:])))
                known = torch.cat((known, torch.full((missing,), -1.0)))
            queries.append(recording.queries(anchor, self.positions))
            documents.append(runs)
            labels.append(known)
        return {
            "query_input_features": torch.stack(queries).float(),
            "query_task": "query",
            "document_input_features": torch.stack(documents).float(),
            "document_task": "document",
            "label": torch.stack(labels),
        }

    def _draw(self, recording: Recording, anchor: int, label: np.ndarray) -> np.ndarray:
        if len(label) <= self.pages:
            return np.arange(len(label))
        order = self.rng.permutation(len(label))
        positive = order[label[order] >= self.golden][: self.pages // 2]
        negative = order[label[order] < self.golden]
        mined = recording.quest[anchor, : len(label)].numpy() + recording.mean_key[anchor, : len(label)].numpy()
        hard = negative[np.argsort(-mined[negative], kind="stable")][: self.pages // 4]
        rest = np.setdiff1d(order, np.concatenate((positive, hard)))
        others = self.rng.permutation(rest)[: self.pages - len(positive) - len(hard)]
        return np.concatenate((positive, hard, others))
