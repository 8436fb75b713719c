"""Recordings as training data: what to predict at each anchor, and batches of documents with anchors in them."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.selection import always_kept, budget_pages
from sglang_lsa.indexer.checkpoint import ModelShape
from sglang_lsa.indexer.heads import Head
from sglang_lsa.indexer.manifest import Entry, Manifest
from sglang_lsa.indexer.recording import BLOCK, BadRecording, Facts, read_recording
from sglang_lsa.memory.pages import pages_complete, pages_spanned

HORIZON = 64
"""Tokens after an anchor whose attention is to be predicted."""


@dataclass(frozen=True)
class Recording:
    """One document, with the attention of the chosen heads.

    Attributes:
        queries: ``[tokens, layers, q_heads, head_dim]`` from position ``facts.first`` on, in the layers of these heads.
        runs: ``[pages, RUNS, layers, kv_heads, head_dim]``.
        mass: float16 ``[blocks, heads, pages]``, the most that each chosen head paid in the block.
        quest, mean_key: float16 ``[blocks, pages]``.
    """

    entry: Entry
    facts: Facts
    queries: torch.Tensor
    runs: torch.Tensor
    mass: torch.Tensor
    quest: torch.Tensor
    mean_key: torch.Tensor

    @property
    def anchors(self) -> range:
        """Blocks before which a set can be chosen: there is a complete page, and the answer, if there is one, is about
        to begin or has begun. What is read before is prompt, which attends to everything."""
        first = pages_spanned(max(0, PAGE_SIZE - self.facts.start), PAGE_SIZE) * PAGE_SIZE // BLOCK
        if self.entry.answer_tokens:
            first = max(first, -(-(self.answer_begins - self.facts.start - BLOCK) // BLOCK))
        return range(first, len(self.mass))

    def position(self, anchor: int) -> int:
        """Tokens of the context before the anchor's block."""
        return self.facts.start + anchor * BLOCK

    def label(self, anchor: int) -> torch.Tensor:
        """The most that each head pays to each complete page in the next tokens, averaged over heads, ``[pages]``."""
        pages = pages_complete(self.position(anchor), PAGE_SIZE)
        return self.mass[anchor : anchor + HORIZON // BLOCK, :, :pages].float().amax(dim=0).mean(dim=0)

    def wanted(self, anchor: int, evidence: float) -> torch.Tensor:
        """The label; but if the whole answer is among the next tokens, pages that it is from get at least ``evidence``.

        Heads that look for one part of an answer after the other do not look at all parts before they begin, and
        attention of sixteen heads may miss what others find; the answer needs these pages all the same.
        """
        label = self.label(anchor)
        if self.answer_begins - self.position(anchor) >= 0 and self.entry.tokens - self.position(anchor) <= HORIZON:
            pages = [page for page in self.entry.evidence if page < len(label)]
            label[pages] = label[pages].clamp(min=evidence)
        return label

    @property
    def answer_begins(self) -> int:
        """In tokens."""
        return self.entry.tokens - self.entry.answer_tokens

    def past(self, anchor: int) -> torch.Tensor:
        """The same of the tokens before; as far as they are recorded."""
        pages = pages_complete(self.position(anchor), PAGE_SIZE)
        before = self.mass[max(0, anchor - HORIZON // BLOCK) : anchor, :, :pages].float()
        return before.amax(dim=0).mean(dim=0) if len(before) else torch.zeros(pages)

    def recent(self, anchor: int, positions: int) -> torch.Tensor:
        """Queries of at most the last ``positions`` tokens before the anchor."""
        stop = self.position(anchor) - self.facts.first
        return self.queries[max(0, stop - positions) : stop]

    def free_pages(self, anchor: int, budget: float, least: int, sink: int, recent: int) -> np.ndarray:
        """Complete pages that are not kept in any case: bool ``[pages]``."""
        context = pages_spanned(self.position(anchor), PAGE_SIZE)
        kept = always_kept(context, budget_pages(context, budget, least), sink, recent)
        return ~kept[: pages_complete(self.position(anchor), PAGE_SIZE)]

    @property
    def shape(self) -> ModelShape:
        """Of the model that was recorded."""
        _, _, q_heads, head_dim = self.queries.shape
        return ModelShape(self.facts.hidden_size, self.facts.model_layers, q_heads, self.runs.shape[3], head_dim)


def load_recordings(folder: pathlib.Path, split: str, heads: Sequence[Head]) -> list[Recording]:
    """Load the recordings of one split.

    Args:
        heads: whose attention is to be predicted.

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
        for layer, head in heads:
            if layer not in facts.layers or head >= facts.q_heads:
                raise BadRecording(
                    f"{manifest.file(entry.name)} is of a model without the head {layer}.{head}, or did not observe "
                    "that layer: use recordings and an indexer of one model"
                )
        chosen = [layer * facts.q_heads + head for layer, head in heads]
        layers = [facts.layers.index(layer) for layer in sorted({layer for layer, _ in heads})]
        recording = Recording(
            entry,
            facts,
            tensors["queries"][:, layers],
            tensors["runs"][:, :, layers],
            tensors["mass"][:, chosen, : len(tensors["runs"])],
            tensors["quest"],
            tensors["mean_key"],
        )
        if found:
            require_same(manifest.file(entry.name), recording, found[0])
        if len(recording.anchors):
            found.append(recording)
    if not found:
        raise BadRecording(f"{folder}: no recording of {split} is longer than a page: record longer prompts")
    return found


def require_same(path: pathlib.Path, recording: Recording, other: Recording) -> None:
    """Raise BadRecording unless both are of one model and of the same layers."""
    mine, others = ((r.shape, r.facts.layers) for r in (recording, other))
    if mine != others:
        raise BadRecording(
            f"{path} is of layers {mine[1]} of {mine[0]}, others of {others[1]} of {others[0]}: "
            "record into separate folders"
        )


class Batches:
    """Turns rows ``{"query": recording, "document": recording}`` into tensors: the collator of the trainer.

    Every document comes with a few anchors in it; the document's pages are positives and negatives, all of them, so the
    pages that a training-free policy would wrongly choose are always among them.

    Args:
        positions: recent tokens that vote.
        anchors: per document.
        evidence: see :meth:`Recording.wanted`.
    """

    def __init__(
        self, recordings: Sequence[Recording], positions: int, anchors: int, seed: int = 0, evidence: float = 0.0
    ):
        self.recordings, self.positions, self.anchors, self.evidence = recordings, positions, anchors, evidence
        self.rng = np.random.default_rng(seed)
        self.valid_label_columns = ["label"]

    def rows(self) -> list[dict[str, int]]:
        return [{"query": number, "document": number} for number in range(len(self.recordings))]

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        """Returns lists with one element a document: ``query_input_features`` of ``[anchors][positions, layers,
        q_heads, head_dim]``, ``document_input_features`` of ``[pages, RUNS, layers, kv_heads, head_dim]``; and
        ``label [documents, anchors, pages]``, -1 where there is no page."""
        queries, documents, labels = [], [], []
        for row in rows:
            recording = self.recordings[row["query"]]
            count = min(self.anchors, len(recording.anchors))
            chosen = self.rng.choice(recording.anchors, size=count, replace=False)
            queries.append([recording.recent(int(anchor), self.positions) for anchor in chosen])
            documents.append(recording.runs)
            labels.append([recording.wanted(int(anchor), self.evidence) for anchor in chosen])
        label = torch.full((len(rows), self.anchors, max(map(len, documents))), -1.0)
        for d, known in enumerate(labels):
            for a, mass in enumerate(known):
                label[d, a, : len(mass)] = mass
        return {
            "query_input_features": queries,
            "query_task": "query",
            "document_input_features": documents,
            "document_task": "document",
            "label": label,
        }
