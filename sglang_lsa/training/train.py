"""``sglang-lsa train``: a memory indexer from recordings, as a dual encoder with sentence-transformers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback, set_seed

from sglang_lsa.indexer.checkpoint import IndexerConfig
from sglang_lsa.indexer.heads import Head, retrieval_heads
from sglang_lsa.indexer.manifest import Manifest
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.indexer.recording import BadRecording
from sglang_lsa.training.calibrate import calibrate, describe, expect, with_expectation, with_threshold
from sglang_lsa.training.card import write_card
from sglang_lsa.training.data import Batches, Recording, load_recordings, require_same
from sglang_lsa.training.losses import PageLoss
from sglang_lsa.training.recall import RecallEvaluator, Rules, measure, recall_table
from sglang_lsa.training.settings import TrainSettings
from sglang_lsa.training.towers import as_sentence_transformer


def train(
    data: pathlib.Path, output: pathlib.Path, settings: TrainSettings, device: str, console: Console
) -> list[dict[str, Any]]:
    """Train on the recordings' split ``train``, and measure on ``held-out``.

    One in five training documents is not trained on: recall on them says when to stop and which weights are best, and
    the threshold is found on them. Held-out documents decide nothing.

    Args:
        output: folder for ``config.json``, ``model.safetensors``, the model card and ``recall.json``.

    Returns:
        The held-out recall of every selector, see ``recall.measure``.

    Raises:
        BadRecording: see ``data.load_recordings``.
        ValueError: a setting does not fit the model.
    """
    began = time.monotonic()
    set_seed(settings.seed)
    heads = sorted(retrieval_heads(data, settings.heads))
    training, held_out = (load_recordings(data, split, heads) for split in ("train", "held-out"))
    require_same(Manifest.open(data).file(held_out[0].entry.name), held_out[0], training[0])
    training, watched = split_off(training)
    indexer = MemoryIndexer(config_for(training[0], heads, settings))
    rules = Rules(settings.golden)
    evaluator = RecallEvaluator(watched, indexer, rules)
    with tempfile.TemporaryDirectory(prefix="sglang-lsa-") as scratch:
        make_trainer(indexer, training, evaluator, settings, device, scratch).train()
    indexer.to(device).eval().requires_grad_(False)
    with_threshold(indexer, *calibrate(watched, indexer, rules, settings.coverage, device))
    with_expectation(indexer, expect(watched, indexer, rules, describe(watched, "train, not trained on"), device))
    indexer.save(output)
    rows = measure(held_out, indexer, rules, device=device)
    seconds = time.monotonic() - began
    result = {
        "settings": dataclasses.asdict(settings),
        "page_bytes": indexer.config.page_bytes,
        "seconds": seconds,
        "history": evaluator.history,
        "rows": rows,
    }
    (output / "recall.json").write_text(json.dumps(result, indent=1) + "\n")
    write_card(
        output,
        Manifest.open(data).model,
        dataclasses.asdict(settings),
        indexer,
        training,
        held_out,
        rows,
        seconds,
        device,
    )
    console.print(recall_table(rows))
    return rows


def split_off(recordings: list[Recording]) -> tuple[list[Recording], list[Recording]]:
    """Four of five, and the fifth, of every family.

    Raises:
        BadRecording: there are too few.
    """
    by_family: dict[str, list[Recording]] = {}
    for recording in recordings:
        by_family.setdefault(recording.entry.family, []).append(recording)
    ordered = [recording for members in by_family.values() for recording in members]
    rest, fifth = [r for i, r in enumerate(ordered) if i % 5], ordered[::5]
    if not rest:
        raise BadRecording(f"{len(recordings)} training recordings are too few to watch one of them: record more")
    return rest, fifth


def config_for(recording: Recording, heads: Sequence[Head], settings: TrainSettings) -> IndexerConfig:
    """An indexer for the model that was recorded; ``heads`` in the order in which their attention was loaded."""
    return IndexerConfig(recording.shape, tuple(heads), settings.sub_keys, settings.key_dim, settings.positions)


def make_trainer(
    indexer: MemoryIndexer,
    training: list[Recording],
    evaluator: RecallEvaluator,
    settings: TrainSettings,
    device: str,
    scratch: str,
) -> SentenceTransformerTrainer:
    """sentence-transformers' trainer for this indexer; ``scratch`` is a folder for what it writes."""
    model = as_sentence_transformer(indexer, device)
    batches = Batches(training, settings.positions, settings.anchors, settings.seed, settings.evidence)
    adapters = [value for value in indexer.parameters() if value.dim() > 1]
    numbers = [value for value in indexer.parameters() if value.dim() == 1]
    rate = settings.learning_rate
    optimizer = torch.optim.AdamW(
        [{"params": adapters, "lr": rate}, {"params": numbers, "lr": 10 * rate}], weight_decay=0.0
    )
    every = max(1, settings.steps // 20)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=scratch,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 20,
        max_grad_norm=1.0,
        seed=settings.seed,
        data_seed=settings.seed,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="no",
        logging_steps=every,
        report_to=[],
        use_cpu=device == "cpu",
        remove_unused_columns=False,
    )
    return SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(batches.rows()),
        loss=PageLoss(model, indexer, settings.loss, settings.golden),
        optimizers=(optimizer, None),
        evaluator=evaluator,
        data_collator=batches,  # type: ignore[arg-type]
        callbacks=[KeepBest(indexer, settings.patience)],
    )


class KeepBest(TrainerCallback):
    """Stops when no more has been kept for some evaluations, and ends with the weights of the best one."""

    def __init__(self, indexer: MemoryIndexer, patience: int):
        self.indexer, self.patience = indexer, patience
        self.best, self.waited = float("-inf"), 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **options: Any) -> None:
        kept = metrics["eval_kept"]
        self.waited += 1
        if kept > self.best:
            self.best, self.waited = kept, 0
            self.weights = {name: value.detach().clone() for name, value in self.indexer.state_dict().items()}
        control.should_training_stop = control.should_training_stop or self.waited >= self.patience

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if self.weights:
            self.indexer.load_state_dict(self.weights)
