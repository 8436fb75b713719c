"""``sglang-lsa train``: a memory indexer from recordings, as a dual encoder with sentence-transformers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback, set_seed

from sglang_lsa.indexer.checkpoint import IndexerConfig
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.training.card import write_card
from sglang_lsa.training.data import Batches, Recording, load_recordings, retrieval_heads
from sglang_lsa.training.losses import PageLoss
from sglang_lsa.training.recall import COLUMNS, RecallEvaluator, Rules, measure, recall_cells
from sglang_lsa.training.settings import TrainSettings
from sglang_lsa.training.towers import as_sentence_transformer


def train(
    data: pathlib.Path, output: pathlib.Path, settings: TrainSettings, device: str, console: Console
) -> list[dict[str, Any]]:
    """Train on the recordings' split ``train``, stop when recall on ``held-out`` no longer rises, write the best.

    Args:
        output: folder for ``config.json``, ``model.safetensors``, the model card and ``recall.json``.

    Returns:
        The held-out recall of every selector, see ``recall.measure``.

    Raises:
        BadRecording: see ``data.load_recordings``.
    """
    began = time.monotonic()
    set_seed(settings.seed)
    chosen = retrieval_heads(data, settings.retrieval_heads) if settings.retrieval_heads else None
    training, held_out = (load_recordings(data, split, chosen) for split in ("train", "held-out"))
    indexer = MemoryIndexer(config_for(training[0], settings))
    rules = Rules(settings.golden, settings.positions)
    evaluator = RecallEvaluator(held_out, indexer, rules)
    with tempfile.TemporaryDirectory(prefix="sglang-lsa-") as scratch:
        make_trainer(indexer, training, evaluator, settings, device, scratch).train()
    indexer.to(device).eval().requires_grad_(False)
    indexer.save(output)
    rows = measure(held_out, indexer, rules, device=device)
    seconds = time.monotonic() - began
    result = {"settings": dataclasses.asdict(settings), "seconds": seconds, "history": evaluator.history, "rows": rows}
    (output / "recall.json").write_text(json.dumps(result, indent=1) + "\n")
    write_card(output, dataclasses.asdict(settings), indexer, training, held_out, rows, seconds, device)
    console.print(recall_table(rows))
    return rows


def config_for(recording: Recording, settings: TrainSettings) -> IndexerConfig:
    """An indexer for the model that was recorded."""
    return IndexerConfig(
        hidden_size=recording.hidden.shape[-1],
        num_hidden_layers=recording.facts.model_layers,
        layers=recording.facts.layers,
        rank=settings.rank,
        heads=settings.heads,
        head_dim=settings.head_dim,
        sub_keys=settings.sub_keys,
    )


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
    batches = Batches(training, settings.positions, settings.pages, settings.golden, settings.seed)
    every = max(1, settings.steps // 20)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=scratch,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 20,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=settings.seed,
        data_seed=settings.seed,
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
        loss=PageLoss(model, settings.loss, settings.golden),
        evaluator=evaluator,
        data_collator=batches,  # type: ignore[arg-type]
        callbacks=[KeepBest(indexer, settings.patience)],
    )


class KeepBest(TrainerCallback):
    """Stops when held-out recall has not risen for some evaluations, and ends with the weights of the best one."""

    def __init__(self, indexer: MemoryIndexer, patience: int):
        self.indexer, self.patience = indexer, patience
        self.best, self.waited = float("-inf"), 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **options: Any) -> None:
        recall = metrics["eval_recall"]
        self.waited += 1
        if recall > self.best:
            self.best, self.waited = recall, 0
            self.weights = {name: value.detach().clone() for name, value in self.indexer.state_dict().items()}
        control.should_training_stop = control.should_training_stop or self.waited >= self.patience

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if self.weights:
            self.indexer.load_state_dict(self.weights)


def recall_table(rows: list[dict[str, Any]]) -> Table:
    """Recall of every selector, to read."""
    table = Table(*COLUMNS, title="held-out recall")
    for cells in recall_cells(rows):
        table.add_row(*cells)
    return table
