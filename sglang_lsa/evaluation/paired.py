"""Differences to full attention on the same questions, with 95 % intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

RESAMPLES = 10_000


def against_full(differences: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Their mean ``delta`` with an interval by bootstrap, ``delta_ci_low`` to ``delta_ci_high``."""
    low, high = np.percentile(rng.choice(differences, (RESAMPLES, len(differences))).mean(axis=1), [2.5, 97.5])
    return {"delta": float(differences.mean()), "delta_ci_low": float(low), "delta_ci_high": float(high)}


def shown(row: dict[str, Any]) -> tuple[str, str]:
    """The difference and its interval, to read."""
    return f"{row['delta']:+.1f}", f"{row['delta_ci_low']:+.1f} to {row['delta_ci_high']:+.1f}"
