"""How many of the pages that will be needed each selector keeps, at the same budget, on recordings."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from sentence_transformers.base.evaluation import BaseEvaluator
from tqdm import tqdm

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.selection import select
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.training.data import Recording

BUDGETS = (0.135, 0.07)
SELECTORS = ("indexer", "quest", "mean_key", "recency", "random", "last_window", "oracle")
"""``last_window`` keeps what the heads truly attended to in the 64 tokens before, of all pages: no server that has only
a part of them on the device can know that. ``oracle`` keeps what they will attend to."""


@dataclass(frozen=True)
class Rules:
    """How a set is chosen from scores, as on a server without ``floor_tokens``, and which pages count as needed.

    Attributes:
        golden: a page is needed when its label is at least this; see ``Recording.label``.
    """

    golden: float
    min_pages: int = 8
    sink_pages: int = 1
    recent_pages: int = 4

    def kept(self, scores: np.ndarray, context: int, budget: float) -> np.ndarray:
        """bool ``[pages]``."""
        positions = select(
            scores,
            context,
            budget=budget,
            min_pages=self.min_pages,
            sink_pages=self.sink_pages,
            recent_pages=self.recent_pages,
        )
        chosen = np.zeros(len(scores), dtype=bool)
        chosen[positions] = True
        return chosen


def measure(
    recordings: Sequence[Recording],
    indexer: MemoryIndexer | None,
    rules: Rules,
    *,
    budgets: Sequence[float] = BUDGETS,
    selectors: Sequence[str] = SELECTORS,
    stride: int = 1,
    device: str = "cpu",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One row for each recording, selector and budget.

    Pages that are kept in any case (first and last ones) count for nobody. ``recall`` is the share of needed pages that
    is kept, ``f1`` its harmonic mean with the share of kept pages that is needed, ``mass`` the share of what heads pay
    to pages that would not be kept in any case, ``evidence`` the share of the pages that the answer is from (all of it,
    though a window needs only a part); each is None where there is nothing to keep. ``told`` is the share of the mass
    that the indexer itself expects to keep.

    Args:
        stride: every so many anchors.
    """
    rows = []
    for recording in tqdm(recordings, desc="recall", unit="recording", leave=False, disable=not progress):
        keys = indexer.keys_of_runs(recording.runs.to(device)) if indexer is not None else None
        sums: dict[tuple[str, float], np.ndarray] = {}
        anchors = recording.anchors[::stride]
        for anchor in anchors:
            label = recording.label(anchor).numpy()
            scores = _scores(recording, anchor, label, indexer, keys, selectors)
            for budget in budgets:
                free = recording.free_pages(anchor, budget, rules.min_pages, rules.sink_pages, rules.recent_pages)
                evidence = _evidence(recording, anchor, free)
                context = pages_spanned(recording.position(anchor), PAGE_SIZE)
                for name, values in scores.items():
                    kept = rules.kept(values, context, budget)
                    needed = (label >= rules.golden) & free
                    found = np.array(
                        [
                            (kept & needed).sum(),
                            needed.sum(),
                            label[kept & free].sum(),
                            label[free].sum(),
                            (kept & evidence).sum(),
                            evidence.sum(),
                            values[kept & free].sum(),
                            values[free].sum(),
                            (kept & free).sum(),
                        ]
                    )
                    sums[name, budget] = sums.get((name, budget), 0) + found
        for (name, budget), found in sums.items():
            kept_golden, golden, kept_mass, mass, kept_evidence, evidences, kept_score, score, kept_pages = found
            rows.append(
                {
                    "document": recording.entry.name,
                    "family": recording.entry.family,
                    "tokens": recording.facts.tokens,
                    "selector": name,
                    "budget": budget,
                    "recall": _share(kept_golden, golden),
                    "f1": _share(2 * kept_golden, golden + kept_pages) if golden else None,
                    "mass": _share(kept_mass, mass),
                    "evidence": _share(kept_evidence, evidences),
                    "told": _share(kept_score, score) if name == "indexer" else None,
                    "golden": float(golden) / len(anchors),
                }
            )
    return rows


def _scores(recording, anchor, label, indexer, keys, selectors) -> dict[str, np.ndarray]:
    """Every selector's scores of the complete pages at one anchor."""
    pages = len(label)
    rng = np.random.default_rng((zlib.crc32(recording.entry.name.encode()), anchor))
    scores: dict[str, np.ndarray] = {
        "quest": recording.quest[anchor, :pages].float().numpy(),
        "mean_key": recording.mean_key[anchor, :pages].float().numpy(),
        "recency": np.arange(1.0, pages + 1),
        "random": rng.random(pages),
        "last_window": recording.past(anchor).numpy(),
        "oracle": label,
    }
    if indexer is not None:
        scores["indexer"] = predict(indexer, recording, anchor, keys).cpu().numpy()
    return {name: scores[name] for name in selectors if name in scores}


@torch.no_grad()
def predict(indexer: MemoryIndexer, recording: Recording, anchor: int, keys: torch.Tensor) -> torch.Tensor:
    """The indexer's scores of the complete pages at one anchor, ``keys`` being those of all pages."""
    asked = indexer.ask(recording.recent(anchor, indexer.config.positions).to(keys.device))
    return indexer.score_all(asked, keys[: len(recording.label(anchor))])


def _evidence(recording: Recording, anchor: int, free: np.ndarray) -> np.ndarray:
    """Pages that the answer is from, bool ``[pages]``."""
    wanted = np.zeros(len(free), dtype=bool)
    wanted[[page for page in recording.entry.evidence if page < len(free)]] = True
    return wanted & free


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def summarise(rows: Iterable[dict[str, Any]], by: Sequence[str] = ("selector", "budget")) -> list[dict[str, Any]]:
    """Means over documents of rows that agree in ``by``; ``n`` counts documents."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    found = []
    for key, members in groups.items():
        means = {}
        for name in ("recall", "f1", "mass", "evidence", "told", "golden"):
            values = [member[name] for member in members if member[name] is not None]
            means[name] = round(float(np.mean(values)), 4) if values else None
        found.append({**dict(zip(by, key, strict=True)), **means, "n": len(members)})
    return found


COLUMNS = ("family", "budget", "selector", "recall", "f1", "mass", "evidence", "documents")


def recall_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A table with :data:`COLUMNS`, in words: over all families first, then by family."""
    found = []
    whole = [{**row, "family": "all"} for row in rows]
    for row in summarise([*whole, *rows], ("family", "budget", "selector")):
        shares = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("recall", "f1", "mass", "evidence")]
        found.append([row["family"], f"{row['budget']:.1%}", row["selector"], *shares, str(row["n"])])
    return found


def recall_table(rows: list[dict[str, Any]]) -> Table:
    """Recall of every selector, to read."""
    table = Table(*COLUMNS, title="held-out recall")
    for cells in recall_cells(rows):
        table.add_row(*cells)
    return table


class RecallEvaluator(BaseEvaluator):
    """Recall on recordings that are not trained on, while an indexer is trained.

    The best indexer is the one that keeps most of what is needed and of what answers are from (``kept``).
    """

    def __init__(self, recordings: Sequence[Recording], indexer: MemoryIndexer, rules: Rules, stride: int = 4):
        super().__init__()
        self.recordings, self.indexer, self.rules, self.stride = recordings, indexer, rules, stride
        self.primary_metric = "kept"
        self.history: list[dict[str, float]] = []

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        device = str(model.device)
        with torch.no_grad():
            rows = measure(
                self.recordings,
                self.indexer,
                self.rules,
                selectors=("indexer",),
                stride=self.stride,
                device=device,
                progress=False,
            )
        by_budget = {row["budget"]: row for row in summarise(rows)}
        metrics = {
            f"{name}_{budget}": by_budget[budget][name] or 0.0
            for budget in BUDGETS
            for name in ("recall", "mass", "evidence")
        }
        for name in ("recall", "evidence"):
            metrics[name] = float(np.mean([metrics[f"{name}_{budget}"] for budget in BUDGETS]))
        metrics["kept"] = (metrics["recall"] + metrics["evidence"]) / 2
        self.history.append({"step": steps, **metrics})
        return metrics
