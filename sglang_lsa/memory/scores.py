"""Scores: the one door through which what a policy scored comes before anything is chosen by it."""

from __future__ import annotations

from enum import Enum

import numpy as np
import torch


class Reduction(Enum):
    """How the scores of ranks that share a model's heads become those of the model."""

    SAME = "same"
    """Every rank has the same ones: nothing is exchanged."""
    MAX = "max"
    """The best vote of any head counts."""
    SUM = "sum"
    """Each head adds its part."""


class Scores:
    """What this rank scored is what counts.

    Sets are chosen by scores, and a rank sees its own heads only; so several ranks must choose by the same numbers.
    Then this is the place where they reduce them: on the device, queued behind what computes them and before they are
    copied to the host, so that nothing waits for it. All ranks come here for the same requests in the same order, since
    they decide the same; one whose policy raised comes, too, and says so (``sglang_lsa.engine.score``).
    """

    shared = False
    """Whether there are several ranks: scores then come as float32 ``[n + 1]`` on the policies' device, and the last
    one says whether the policy failed."""
    who = "this rank"
    """Who waits for them, in words."""

    def reduce(self, scores: np.ndarray | torch.Tensor, how: Reduction) -> np.ndarray | torch.Tensor:
        """Scores of all heads, ``[n]``, when those of this rank's are ``scores``."""
        return scores
