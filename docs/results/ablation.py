"""Trains indexers that differ in one setting on the same recordings, and compares what they find.

    python docs/results/ablation.py RECORDINGS --output docs/results --jobs 4

Writes ``ablation.json`` and the table ``ablation.md``. Every variant is a run of ``sglang-lsa train``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

VARIANTS: tuple[dict[str, str], ...] = (
    {},
    {"seed": "1"},
    {"seed": "2"},
    {"steps": "1"},
    {"loss": "focal"},
    {"loss": "regression"},
    {"heads": "4"},
    {"heads": "8"},
    {"heads": "32"},
    {"sub-keys": "4"},
    {"sub-keys": "8"},
    {"sub-keys": "16"},
    {"key-dim": "16"},
    {"key-dim": "64"},
    {"positions": "16"},
    {"positions": "32"},
    {"positions": "128"},
)
"""One setting changed at a time; ``steps 1`` is the indexer before training. Heads change what is predicted, too."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("ablation-output"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; default: 1")
    parser.add_argument("--train-args", default="", help="more arguments for every training")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = pool.map(lambda variant: train(args.recordings, variant, args.train_args.split()), VARIANTS)
        for result in tqdm(runs, total=len(VARIANTS), desc="training", unit="indexer"):
            results.append(result)
            (args.output / "ablation.json").write_text(json.dumps(results, indent=1) + "\n")
            (args.output / "ablation.md").write_text(table(results))
    print(table(results))
    return 0


def train(recordings: pathlib.Path, variant: dict[str, str], more: list[str]) -> dict[str, Any]:
    """Train one indexer and read what it found."""
    changed = [part for name, value in variant.items() for part in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sglang_lsa.cli", "train", str(recordings), "--output", folder]
        done = subprocess.run([*command, *more, *changed], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(changed)} failed:\n{done.stderr[-3000:]}")
        found = json.loads((pathlib.Path(folder) / "recall.json").read_text())
        page_bytes = found["page_bytes"]
    means = {}
    for budget in (0.135, 0.07):
        rows = [row for row in found["rows"] if row["budget"] == budget]
        for name in ("recall", "mass", "evidence"):
            for selector in ("indexer", "oracle"):
                values = [row[name] for row in rows if row["selector"] == selector and row[name] is not None]
                means[f"{selector} {name} {budget}"] = round(sum(values) / len(values), 4) if values else None
    return {"changed": variant, "page_bytes": page_bytes, "seconds": round(found["seconds"], 1), **means}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| changed | bytes a page | recall 13.5 % | of the oracle's | recall 7 % | evidence 13.5 % | evidence 7 % |",
        "| --- " * 7 + "|",
    ]
    for row in results:
        name = ", ".join(f"{key} {value}" for key, value in row["changed"].items()) or "nothing"
        names = ("recall 0.135", "recall 0.07", "evidence 0.135", "evidence 0.07")
        recall, *others = (f"{row[f'indexer {name}']:.3f}" for name in names)
        share = row["indexer recall 0.135"] / row["oracle recall 0.135"]
        lines.append(f"| {' | '.join((name, format(row['page_bytes'], ','), recall, f'{share:.2f}', *others))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
