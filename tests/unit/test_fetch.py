"""Fetch, where nothing has to be fetched: on a CPU scores are here when they are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_lsa.engine.deferred_scores import Fetch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "scores",
    [np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), np.zeros(0), torch.zeros(0)],
    ids=["array", "tensor", "empty array", "empty tensor"],
)
def test_scores_come_back(scores: np.ndarray | torch.Tensor) -> None:
    with Fetch.timed(CPU) as queued:
        queued.scores = scores
    for fetch in (queued, Fetch.of(scores)):
        values = fetch.values()
        assert isinstance(values, np.ndarray)
        assert values.tolist() == scores.tolist()
        assert fetch.values().tolist() == scores.tolist(), "may be read again"
        assert fetch.device_seconds == 0.0


def test_an_error_while_queueing_is_the_callers() -> None:
    with pytest.raises(KeyError, match="lost"), Fetch.timed(CPU):
        raise KeyError("lost")
