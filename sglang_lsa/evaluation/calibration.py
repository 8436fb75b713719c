"""``sglang-lsa bench calibration``: which pages of known evidence each way of choosing keeps, without a server.

The model reads made prompts with full attention (``transformers``, any device). Calibration sees those of the training
split; what is measured are those of the held-out split, of other documents, words and sentences. A set is chosen once,
before the answer, by the rules of a server.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.observe import default_layers
from sglang_lsa.engine.selection import always_kept, budget_pages, select
from sglang_lsa.evaluation.watched import load, watched
from sglang_lsa.indexer import untrained
from sglang_lsa.indexer.checkpoint import ModelShape
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.indexer.watch import Seen
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.provenance import commit
from sglang_lsa.texts.calibration import PromptSet, calibration_prompts
from sglang_lsa.texts.corpus import make_prompts

RESAMPLED = 10_000


def run(
    output: pathlib.Path,
    console: Console,
    *,
    model: str,
    name: str,
    indexer: str | None,
    families: Sequence[str],
    calibrate: PromptSet,
    lengths: Sequence[int],
    samples: int,
    budgets: Sequence[float],
    device: str,
    command: str,
) -> dict[str, Any]:
    """Calibrate, then measure; adds to ``calibration.json``.

    Args:
        indexer: trained one to compare with; None for none.
        samples: held-out prompts of each family and length.

    Raises:
        ValueError: prompts cannot be made as asked, the indexer is of another model, or no heads are found.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 1 << 40
    trained = MemoryIndexer.load(indexer) if indexer else None
    loaded = load(model, device, torch.float32 if device == "cpu" else torch.bfloat16)
    shape = shape_of(loaded.config)
    if trained is not None:
        trained.config.require_model(shape, f"--indexer {indexer}")
    options: dict[str, Any] = {"sees": untrained.SEES}
    prompts = calibration_prompts(tokenizer, calibrate)
    began = time.monotonic()
    seen = list(tqdm(watched(loaded, prompts, **options), desc="calibrating", total=len(prompts)))
    found = untrained.find_heads(seen)
    own = untrained.make_indexer(shape, found, seen)
    seconds = time.monotonic() - began
    options |= {"quest_layers": default_layers(shape.num_hidden_layers)}
    options |= {"keep": trained.config.layers if trained else ()}
    rows = []
    held_out = list(make_prompts(tokenizer, "held-out", lengths, samples, families))
    for prompt, tokens in tqdm(held_out, desc="held-out prompts"):
        (part,) = watched(loaded, [tokens], **options)
        arms = scores(part, own, trained)
        length = next(length for length in lengths if f"-{length}-" in prompt.name)
        rows += [
            {"prompt": prompt.name, "family": prompt.family, "length": length, **row}
            for row in recalls(part, arms, len(tokens.ids) - tokens.answer, budgets)
        ]
    result: dict[str, Any] = {
        "model": name,
        "commit": commit(),
        "command": command,
        "calibration": {
            "prompts": len(prompts),
            "tokens": sum(len(prompt.ids) for prompt in prompts),
            "seconds": round(seconds, 1),
            "lift": found.lift,
            "heads": found.heads,
            "weights": found.weights,
            "threshold": own.config.threshold,
            "coverage": own.config.coverage,
        },
        "summary": summary(rows),
        "rows": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "calibration.json"
    earlier = json.loads(path.read_text()) if path.exists() else []
    kept = [other for other in earlier if other["model"] != name]
    path.write_text(json.dumps([*kept, result], indent=1) + "\n")
    console.print(table(result["summary"]))
    return result


def shape_of(config: Any) -> ModelShape:
    """Of a configuration of ``transformers``."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(config.hidden_size, config.num_hidden_layers, heads, config.num_key_value_heads, dim)


def scores(part: Seen, own: MemoryIndexer, trained: MemoryIndexer | None) -> dict[str, np.ndarray]:
    """Of the complete pages before the answer, by who gives them."""
    layers, heads = zip(*own.config.heads, strict=True)
    pages = part.told.shape[2]
    given = {"calibrated": own.combine(part.told[layers, heads]).numpy(), "recency": np.arange(1.0, pages + 1)}
    if part.quest is not None:
        given["quest"] = part.quest.numpy()
    if trained is not None:
        observed = trained.config.layers
        queries = torch.stack([part.queries[layer] for layer in observed], dim=1)
        runs = torch.stack([part.runs[layer] for layer in observed], dim=2)
        with torch.no_grad():
            asked = trained.ask(queries[-trained.config.positions :])
            given["trained"] = trained.score_all(asked, trained.keys_of_runs(runs)).numpy()
    return given


def recalls(part: Seen, arms: Mapping[str, np.ndarray], context: int, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """The share of the evidence that each arm keeps, of pages that do not stay in any case; none without such pages.
    Sets are chosen as on a server, but for the floor of short contexts, beside which budgets would not differ.

    Args:
        context: tokens before the answer.
    """
    config, spanned = LSAConfig(policy="quest"), pages_spanned(context, PAGE_SIZE)
    rows = []
    for budget in budgets:
        sizes = {"sink_pages": config.sink_pages, "recent_pages": config.recent_pages}
        sizes |= {"prompt": spanned, "prompt_pages": config.prompt_pages}
        stay = always_kept(spanned, budget_pages(spanned, budget, config.min_pages), **sizes)
        wanted = [number for number in part.evidence if not stay[number]]
        if not wanted:
            continue
        for arm, given in arms.items():
            kept = select(given, spanned, budget=budget, min_pages=config.min_pages, **sizes)
            rows.append({"arm": arm, "budget": budget, "recall": float(np.isin(wanted, kept).mean())})
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean recall with a 95 % interval (bootstrap over prompts), and the difference of ``calibrated`` to each arm on
    the same prompts with its own: by length and budget, over all families and by family."""
    rng = np.random.default_rng(0)
    found = []
    for length, family, budget in dict.fromkeys(
        (row["length"], family, row["budget"]) for row in rows for family in ("all", row["family"])
    ):
        members = [row for row in rows if row["length"] == length and row["budget"] == budget]
        members = [row for row in members if family in ("all", row["family"])]
        ours = {row["prompt"]: row["recall"] for row in members if row["arm"] == "calibrated"}
        for arm in dict.fromkeys(row["arm"] for row in members):
            own = {row["prompt"]: row["recall"] for row in members if row["arm"] == arm}
            values = np.array(list(own.values()))
            ahead = np.array([ours[prompt] - value for prompt, value in own.items()])
            found.append(
                {
                    "length": length,
                    "family": family,
                    "budget": budget,
                    "arm": arm,
                    "n": len(own),
                    "recall": float(values.mean()),
                    "interval": interval(values, rng),
                    "calibrated_minus_arm": float(ahead.mean()),
                    "difference_interval": interval(ahead, rng),
                }
            )
    return found


def interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 %, of the mean."""
    means = rng.choice(values, (RESAMPLED, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def table(found: Sequence[dict[str, Any]]) -> Table:
    """The summary, to read."""
    shown = Table("tokens", "family", "budget", "arm", "prompts", "recall", "95 %", "calibrated - arm", "95 %")
    for row in found:
        spans = [f"{low:.2f} to {high:.2f}" for low, high in (row["interval"], row["difference_interval"])]
        cells = (str(row["n"]), f"{row['recall']:.2f}", spans[0], f"{row['calibrated_minus_arm']:+.2f}", spans[1])
        shown.add_row(str(row["length"]), row["family"], f"{row['budget']:.0%}", row["arm"], *cells)
    return shown
