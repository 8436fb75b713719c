"""Losses: from the scores that the towers give pages, and how much attention the pages got.

All take scores ``[..., pages]`` and masses of the same shape, both shares of attention in [0, 1]; where the mass is
negative there is no page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.functional import binary_cross_entropy, smooth_l1_loss

from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.training.towers import scores

FOCUS = 2.0
"""Exponent of the focal loss, as in arXiv 2606.09079."""
LEAST_MASS = 1e-3
"""Masses below this are equal to the regression."""
NOTABLE = 0.05
"""Masses below this do not count as asked for in the contrastive loss."""


def focal(score: torch.Tensor, mass: torch.Tensor, golden: float) -> torch.Tensor:
    """Binary cross-entropy on golden or not, pages that are easy counting less (Lin et al., ICCV 2017).

    A score is odds on ``golden``: a page that scores so much is as likely golden as not.
    """
    real = mass >= 0
    chance = (score / (score + golden)).clamp(1e-6, 1 - 1e-6)
    loss = binary_cross_entropy(chance, (mass >= golden).float(), reduction="none")
    return ((1 - torch.exp(-loss)) ** FOCUS * loss)[real].mean()


def contrastive(score: torch.Tensor, mass: torch.Tensor, golden: float) -> torch.Tensor:
    """Cross-entropy between the pages' shares of the mass and of the score, in each document; and, so that scores
    mean something by themselves, between mass and score of each page."""
    real = mass >= 0
    told = score.clamp(1e-6, 1 - 1e-6)
    share = torch.where(mass >= NOTABLE, mass, 0.0)
    asked = share.sum(dim=-1) > 0
    share = share / share.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    chance = torch.where(real, told, 0.0)
    chance = (chance / chance.sum(dim=-1, keepdim=True).clamp(min=1e-9)).clamp(min=1e-9).log()
    alone = binary_cross_entropy(told[real], mass[real].clamp(max=1.0))
    return -(share * chance).sum(dim=-1)[asked].sum() / asked.sum().clamp(min=1) + 10 * alone


def regression(score: torch.Tensor, mass: torch.Tensor, golden: float) -> torch.Tensor:
    """Distance of the logarithms of predicted and true mass."""
    real = mass >= 0
    return smooth_l1_loss(score[real].clamp(min=LEAST_MASS).log(), mass[real].clamp(min=LEAST_MASS).log())


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "focal": focal,
    "contrastive": contrastive,
    "regression": regression,
}


class PageLoss(nn.Module):
    """One of :data:`LOSSES` for the trainer."""

    def __init__(self, model: SentenceTransformer, indexer: MemoryIndexer, name: str, golden: float):
        super().__init__()
        self.model, self.loss, self.golden = model, LOSSES[name], golden
        self._indexer = [indexer]  # its parameters are the model's already

    def forward(self, features: list[dict[str, Any]], labels: torch.Tensor) -> torch.Tensor:
        queries, pages = (self.model(part) for part in features)
        return self.loss(scores(self._indexer[0], queries, pages, labels), labels, self.golden)
