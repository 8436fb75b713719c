"""What a training run is told; the flags of ``sglang-lsa train`` are these fields. Imports nothing large."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sglang_lsa.config import RECORDED_POSITIONS, RUNS

LOSS_NAMES = ("focal", "contrastive", "regression")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run.

    Raises:
        ValueError: a value is impossible.
    """

    loss: str = _setting("contrastive", "what is minimised")
    heads: int = _setting(16, "heads of the model that are read and predicted: those that look at evidence most")
    sub_keys: int = _setting(32, "keys of a page; divides 32")
    key_dim: int = _setting(32, "of queries and keys")
    positions: int = _setting(64, "recent tokens that vote; at most 128")
    golden: float = _setting(0.3, "share of the heads' attention from which on a page counts as needed")
    evidence: float = _setting(
        0.5, "share of attention that a page counts as getting at least, if an answer that is about to begin is from it"
    )
    coverage: float = _setting(0.9, "share of the heads' attention to be kept by the threshold")
    steps: int = _setting(600, "at most")
    batch: int = _setting(4, "documents in a batch")
    anchors: int = _setting(4, "positions of each document at which pages are chosen")
    learning_rate: float = _setting(1e-3, "at its height; ten times as much for what is one number a head")
    patience: int = _setting(5, "evaluations without a better recall before training stops")
    seed: int = _setting(0, "of everything random")

    def __post_init__(self) -> None:
        if self.loss not in LOSS_NAMES:
            raise ValueError(f"--loss is {self.loss!r}: use one of {', '.join(LOSS_NAMES)}")
        if self.sub_keys < 1 or RUNS % self.sub_keys:
            raise ValueError(f"--sub-keys {self.sub_keys} does not divide a page's {RUNS} parts: use 1, 2, 4, 8, ...")
        for name in ("golden", "coverage"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range: use a share of attention in (0, 1)")
        if not 0 <= self.evidence < 1:
            raise ValueError(f"--evidence {self.evidence} is out of range: use a share of attention in [0, 1)")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate {self.learning_rate} is out of range: use a number above 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed} is out of range: use 0 to {2**32 - 1}")
        for name in ("heads", "key_dim", "positions", "steps", "batch", "anchors", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small: use 1 or more")
        if self.positions > RECORDED_POSITIONS:
            raise ValueError(f"--positions {self.positions} is too large: recordings have {RECORDED_POSITIONS}")
