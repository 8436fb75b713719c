"""Which attention heads find the evidence of an answer, by recordings."""

from __future__ import annotations

import pathlib

import torch
from tqdm import tqdm

from sglang_lsa.indexer.manifest import Manifest
from sglang_lsa.indexer.recording import BLOCK, BadRecording, read_recording

Head = tuple[int, int]
"""Layer and query head."""


def retrieval_heads(folder: pathlib.Path, count: int, observed_only: bool = True) -> list[Head]:
    """The heads that pay most attention to the evidence of an answer while it is given, best first.

    Only training prompts with known evidence count. This is the retrieval score of Wu et al. (arXiv 2404.15574) with
    attention mass on pages in place of copied tokens.

    Args:
        observed_only: leave out heads of layers whose queries were not recorded.

    Raises:
        BadRecording: there are no such prompts, or they are of different models.
    """
    manifest = Manifest.open(folder)
    entries = [e for e in manifest.entries.values() if e.split == "train" and e.evidence and e.answer_tokens]
    if not entries:
        raise BadRecording(
            f"{folder} has no training prompts with known evidence: record families that ask questions, such as facts"
        )
    total: torch.Tensor | None = None
    known: tuple[tuple[int, ...], int, int] | None = None
    late = beyond = 0
    for entry in tqdm(entries, desc="looking for retrieval heads", unit="recording", leave=False):
        facts, tensors = read_recording(manifest.file(entry.name), ("mass",))
        mass = tensors["mass"]
        own = (facts.layers, facts.model_layers, facts.q_heads)
        known = known or own
        if own != known or mass.shape[1] != facts.model_layers * facts.q_heads:
            raise BadRecording(
                f"{manifest.file(entry.name)} observed layers {own[0]} of {own[1]} with {own[2]} heads (attention of "
                f"{mass.shape[1]}), others {known[0]} of {known[1]} with {known[2]}: record into separate folders"
            )
        first = max(0, (entry.tokens - entry.answer_tokens - facts.start) // BLOCK)
        last = -(-(entry.tokens - facts.start) // BLOCK)
        evidence = [page for page in entry.evidence if page < mass.shape[2]]
        if first >= min(last, len(mass)):
            late += 1
        elif not evidence:
            beyond += 1
        else:
            share = mass[first:last][:, :, evidence].float().amax(dim=2).mean(dim=0).view(-1, facts.q_heads)
            total = share if total is None else total + share
    if total is None:
        raise BadRecording(
            f"{folder}: of {len(entries)} training prompts with known evidence, {late} have answers before what was "
            f"recorded (record with a larger --last) and {beyond} have evidence only beyond their complete pages "
            "(record longer prompts)"
        )
    if observed_only:
        unseen = [layer for layer in range(len(total)) if layer not in facts.layers]
        total[unseen] = float("-inf")
    best = total.flatten().topk(min(count, int(torch.isfinite(total).sum()))).indices.tolist()
    return [(place // total.shape[1], place % total.shape[1]) for place in best]
