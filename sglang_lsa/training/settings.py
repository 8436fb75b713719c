"""What a training run is told; the flags of ``sglang-lsa train`` are these fields. Imports nothing large."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
    rank: int = _setting(128, "of the query towers' projection")
    heads: int = _setting(8, "of the query towers")
    head_dim: int = _setting(128, "of queries and keys")
    sub_keys: int = _setting(4, "keys of a page; divides 8")
    positions: int = _setting(32, "recent tokens that vote")
    retrieval_heads: int = _setting(0, "heads of the model whose attention is predicted, best first; 0 for all")
    golden: float = _setting(0.2, "share of a head's attention from which on a page counts as needed")
    steps: int = _setting(1000, "at most")
    batch: int = _setting(16, "queries in a batch")
    pages: int = _setting(64, "pages that each query chooses from")
    learning_rate: float = _setting(1e-3, "at its height")
    patience: int = _setting(5, "evaluations without a better recall before training stops")
    seed: int = _setting(0, "of everything random")

    def __post_init__(self) -> None:
        if self.loss not in LOSS_NAMES:
            raise ValueError(f"--loss is {self.loss!r}: use one of {', '.join(LOSS_NAMES)}")
        if self.sub_keys not in (1, 2, 4, 8):
            raise ValueError(f"--sub-keys {self.sub_keys} does not divide a page's 8 parts: use 1, 2, 4 or 8")
        if not 0 < self.golden < 1:
            raise ValueError(f"--golden {self.golden} is out of range: use a share of attention in (0, 1)")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate {self.learning_rate} is out of range: use a number above 0")
        for name in ("rank", "heads", "head_dim", "positions", "steps", "batch", "pages", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small: use 1 or more")
        if self.retrieval_heads < 0:
            raise ValueError(f"--retrieval-heads {self.retrieval_heads} is too small: use 0 or more")
