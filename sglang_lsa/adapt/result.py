"""What a run leaves: the indexer, its card with what was measured, and a picture of that."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sglang_lsa.adapt.settings import Settings
from sglang_lsa.config import LSAConfig
from sglang_lsa.evaluation.arms import FULL
from sglang_lsa.evaluation.quality import NAME as QUALITY
from sglang_lsa.evaluation.summary import AVERAGE
from sglang_lsa.training.recall import SELECTORS, summarise

PICTURE = "adapt.png"
CARD = "README.md"
COLUMNS = ("task", "tokens", "arm", "accuracy", "difference to full", "95 % interval", "device memory", "KL a token")


def write_result(
    output: pathlib.Path, indexer: pathlib.Path, model: str, settings: Settings, seconds: Mapping[str, float]
) -> None:
    """Put indexer, card and picture into ``output``; the configuration comes last, without which nothing is served.

    Args:
        indexer: folder of the trained one.
        seconds: of each step.
    """
    rows = json.loads((output / "evaluation" / QUALITY).read_text())["rows"]
    recall = json.loads((indexer / "recall.json").read_text())
    draw(output / PICTURE, recall["rows"], rows)
    card = (indexer / CARD).read_text() + compared(rows, settings, seconds)
    for name, data in ((CARD, card.encode()), ("recall.json", (indexer / "recall.json").read_bytes())):
        (output / name).write_bytes(data)
    for name in ("model.safetensors", "config.json"):
        partial = output / f"{name}.partial"
        shutil.copyfile(indexer / name, partial)
        os.replace(partial, output / name)


def compared(rows: Sequence[Mapping[str, Any]], settings: Settings, seconds: Mapping[str, float]) -> str:
    """The part of the card about answers."""
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    lines = [
        "",
        "## Answers, against full attention",
        "",
        f"![Recall, and answers against full attention]({PICTURE})",
        "",
        f"{settings.samples} questions of every task and length, the same ones for every arm, greedy; sets of at most "
        f"{settings.budget:.1%} of a context's pages, of short ones {LSAConfig.floor_tokens:,} tokens. "
        "`lsa` is this indexer, `recency` keeps the last pages, `random` random ones. Accuracy in points of 100 with "
        "the 95 % interval of the difference to full attention, device memory of the KV and keys as a share of all "
        "KV, and how far the next-token distribution is from full attention's (in nats, along its answer; tokens but "
        "the likeliest are one class, so a lower bound). So few questions tell what is badly wrong, not what is best: "
        "`sglang-lsa eval` asks more. Texts are speeches that nothing was trained on.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
        *(f"| {' | '.join(_cells(row))} |" for row in rows if row["suite"] != "all"),
        "",
        f"Made by `sglang-lsa adapt`: {spent}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    mark = "" if row["counted"] else " *"
    full = row["arm"] == FULL
    kept = f"{row['footprint']:.1%}" if row["footprint"] is not None else ""
    far = ""
    if row["kl"] is not None:
        few = f", n {row['kl_n']}" if row["kl_n"] != row["n"] else ""
        far = f"{row['kl']:.4f} ({row['kl_ci_low']:.4f} to {row['kl_ci_high']:.4f}{few})"
    interval = "" if full else f"{row['delta_ci_low']:+.1f} to {row['delta_ci_high']:+.1f}"
    return [
        row["task"] + mark,
        str(row["length"]),
        row["arm"],
        f"{row['accuracy']:.1f}",
        "" if full else f"{row['delta']:+.1f}",
        interval,
        kept,
        far,
    ]


def draw(path: pathlib.Path, recall: Sequence[dict[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Left: pages found on held-out recordings, by who chooses; right: accuracy by arm and length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    means = summarise(recall, ("budget", "selector"))
    budgets = sorted({row["budget"] for row in means}, reverse=True)
    names = [name for name in SELECTORS if any(row["selector"] == name for row in means)]
    for place, budget in enumerate(budgets):
        of = {row["selector"]: row["recall"] or 0.0 for row in means if row["budget"] == budget}
        at = np.arange(len(names)) + (place - (len(budgets) - 1) / 2) * 0.4
        left.bar(at, [of[name] for name in names], 0.38, label=f"{budget:.1%} of the pages")
    left.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
    left.set_ylabel("share of needed pages that is kept")
    left.legend(fontsize=8)
    averages = [row for row in rows if row["suite"] == "all" and row["task"] == AVERAGE] or list(rows)
    lengths = sorted({row["length"] for row in averages})
    arms = list(dict.fromkeys(row["arm"] for row in averages))
    for place, arm in enumerate(arms):
        own = [
            float(np.mean([row["accuracy"] for row in averages if row["arm"] == arm and row["length"] == length]))
            for length in lengths
        ]
        at = np.arange(len(lengths)) + (place - (len(arms) - 1) / 2) * 0.8 / len(arms)
        right.bar(at, own, 0.75 / len(arms), label=arm)
    right.set_xticks(range(len(lengths)), [f"{length:,} tokens" for length in lengths])
    right.set_ylabel("accuracy, points of 100")
    right.set_ylim(0, 100)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
