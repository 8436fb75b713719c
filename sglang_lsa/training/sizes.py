"""What sets of a fixed share of the pages cover, and sets that are as large as they need to be, on recordings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table
from tqdm import tqdm

from sglang_lsa.config import AUTO, PAGE_SIZE, LSAConfig
from sglang_lsa.engine.choose import Rules, choose
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.training.data import Recording
from sglang_lsa.training.recall import predict

POLICY = "indexer"
UNBOUNDED = 1 << 30
"""Pages of the largest set: no device pool bounds it here."""
MEASURED = ("pages", "covered", "expected", "mass", "needed", "evidence")


def measure_sizes(
    recordings: Sequence[Recording],
    indexer: MemoryIndexer,
    *,
    budgets: Sequence[float],
    targets: Sequence[float],
    golden: float,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """One row for each recording and way to size a set: a fixed budget, or ``auto`` with a target; chosen as a server
    with this indexer chooses, but for the floor of short contexts, beside which budgets would not differ.

    ``pages`` is the share of the context's pages that are in the set, those that always stay and the growing one
    included: so much of the KV's bytes. ``covered`` is the share of the heads' attention to all complete pages in the
    next window, ``expected`` what was expected of that. ``mass``, ``needed`` (pages that get ``golden`` of the
    attention or more) and ``evidence`` are shares, as in ``recall.measure``, of pages that may be left out, and None
    where there is nothing to keep. All are means over anchors.

    Raises:
        ValueError: ``targets`` are given and the indexer does not know what its sets cover.
    """
    known = indexer.config.expectation
    if targets and known is None:
        raise ValueError("--targets: the indexer does not know what its sets cover: run sglang-lsa calibrate first")
    ways = [LSAConfig(indexer="it", budget=budget, floor_tokens=0) for budget in budgets]
    ways += [LSAConfig(indexer="it", budget=AUTO, target_coverage=target, floor_tokens=0) for target in targets]
    rows = []
    for recording in tqdm(recordings, desc="sizes", unit="recording", leave=False):
        keys = indexer.keys_of_runs(recording.runs.to(device))
        prompt = pages_spanned(recording.answer_begins, PAGE_SIZE)
        sums = {config: np.zeros(9) for config in ways}
        for anchor in recording.anchors:
            label = recording.label(anchor).numpy()
            scores = predict(indexer, recording, anchor, keys).cpu().numpy()
            context = pages_spanned(recording.position(anchor), PAGE_SIZE)
            for config in ways:
                expectations = {} if known is None else {POLICY: known}
                rules = Rules(config, UNBOUNDED, {POLICY: indexer.config.threshold}, expectations)
                target = config.target_coverage if config.auto else None
                found = choose(rules, scores, context, config.largest_budget, POLICY, prompt, target=target)
                kept = np.zeros(len(label), dtype=bool)
                kept[found.positions] = True
                # Of all ways, pages count that none keeps in any case.
                free = recording.free_pages(anchor, 1.0, config.min_pages, config.sink_pages, config.recent_pages)
                needed, evidence = (label >= golden) & free, np.zeros(len(label), dtype=bool)
                evidence[[page for page in recording.entry.evidence if page < len(label)]] = True
                evidence &= free
                sums[config] += (
                    (len(found.positions) + context - len(label)) / context,
                    label[kept].sum() / label.sum() if label.sum() > 0 else 1.0,
                    label[kept & free].sum(),
                    label[free].sum(),
                    found.expected or 0.0,
                    (kept & needed).sum(),
                    needed.sum(),
                    (kept & evidence).sum(),
                    evidence.sum(),
                )
        anchors = len(recording.anchors)
        for config, found_of in sums.items():
            pages, covered, got, mass, expected, found_needed, all_needed, found_evidence, all_evidence = found_of
            rows.append(
                {
                    "document": recording.entry.name,
                    "family": recording.entry.family,
                    "tokens": recording.facts.tokens,
                    "budget": config.budget,
                    "target": config.target_coverage if config.auto else None,
                    "pages": float(pages) / anchors,
                    "covered": float(covered) / anchors,
                    "expected": float(expected) / anchors if known is not None else None,
                    "mass": _share(got, mass),
                    "needed": _share(found_needed, all_needed),
                    "evidence": _share(found_evidence, all_evidence),
                }
            )
    return rows


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def way(row: dict[str, Any]) -> str:
    """How the sets of a row are sized, in words."""
    return f"{row['budget']:.1%}" if row["target"] is None else f"{AUTO} {row['target']:g}"


def summarise_sizes(rows: Sequence[dict[str, Any]], by: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Means over documents, in the order of the ways; ``n`` counts documents."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((*(row[name] for name in by), way(row)), []).append(row)
    found = []
    for key, members in groups.items():
        means = {}
        for name in MEASURED:
            values = [member[name] for member in members if member[name] is not None]
            means[name] = round(float(np.mean(values)), 4) if values else None
        spread = [member["pages"] for member in members]
        limits = {"least": round(min(spread), 4), "most": round(max(spread), 4)}
        found.append({**dict(zip((*by, "sets"), key, strict=True)), **means, **limits, "n": len(members)})
    return found


def sizes_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Over all documents, to read."""
    names = ("sets", *MEASURED, "least", "most", "n")
    table = Table(*names, title="sets of a fixed share, and as large as they need to be")
    for row in summarise_sizes(rows):
        cells = ("" if (value := row[name]) is None else value for name in names)
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table
