"""Losses: from what the towers say of pages, and how much attention the pages got.

All take logits ``[batch, pages]`` and the largest attention mass of any head, of the same shape, in [0, 1]; where that
is negative there is no page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss

from sglang_lsa.training.towers import logits

FOCUS = 2.0
"""Exponent of the focal loss, as in arXiv 2606.09079."""
LEAST_MASS = 1e-3
"""Masses below this are equal to the regression."""


def focal(scores: torch.Tensor, mass: torch.Tensor, golden: float) -> torch.Tensor:
    """Binary cross-entropy on golden or not, pages that are easy counting less (Lin et al., ICCV 2017)."""
    real = mass >= 0
    target = (mass >= golden).float()
    loss = binary_cross_entropy_with_logits(scores, target, reduction="none")
    sure = torch.exp(-loss)
    return ((1 - sure) ** FOCUS * loss)[real].mean()


def contrastive(scores: torch.Tensor, mass: torch.Tensor, golden: float) -> torch.Tensor:
    """Cross-entropy between the pages' shares of the mass and the softmax over pages of the same document."""
    real = mass >= 0
    share = torch.where(mass >= golden, mass, 0.0)
    asked = share.sum(dim=1) > 0
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-9)
    chance = scores.masked_fill(~real, float("-inf")).log_softmax(dim=1).masked_fill(~real, 0.0)
    # The sigmoid of the logits is what the server compares with a threshold, so they must mean something by themselves.
    anchor = binary_cross_entropy_with_logits(scores, (mass >= golden).float(), reduction="none")[real].mean()
    return -(share * chance).sum(dim=1)[asked].sum() / asked.sum().clamp(min=1) + anchor


def regression(scores: torch.Tensor, mass: torch.Tensor, golden: float) -> torch.Tensor:
    """Distance of the logarithms of predicted and true mass; the prediction is the sigmoid."""
    real = mass >= 0
    told = nn.functional.logsigmoid(scores)[real].clamp(min=torch.tensor(LEAST_MASS).log().item())
    return smooth_l1_loss(told, mass[real].clamp(min=LEAST_MASS).log())


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "focal": focal,
    "contrastive": contrastive,
    "regression": regression,
}


class PageLoss(nn.Module):
    """One of :data:`LOSSES` for the trainer."""

    def __init__(self, model: SentenceTransformer, name: str, golden: float):
        super().__init__()
        self.model, self.loss, self.golden = model, LOSSES[name], golden

    def forward(self, features: list[dict[str, Any]], labels: torch.Tensor) -> torch.Tensor:
        queries, pages = (self.model(part) for part in features)
        return self.loss(logits(queries, pages), labels, self.golden)
