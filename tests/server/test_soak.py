"""The short soak of every check; ``tests/support/soak.py`` runs long ones."""

from __future__ import annotations

import json

import pytest
from serving import flush, wait_until_idle
from soak import Soak

from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
REQUESTS = 64


def test_answers_under_pressure_equal_those_of_an_idle_server(small: ServerProcess) -> None:
    """16 clients over a pool of 32 pages. Once all of them lose their places. Nothing is lost or left, and every
    answer can be had again."""
    flush(small)
    soak = Soak(small, seed=7)
    outcomes = soak.run(REQUESTS)
    status = wait_until_idle(small)
    print(json.dumps({name: status[name] for name in ("prefill", "pressure", "failures", "evictions")}))
    seen = soak.check(outcomes)
    print(json.dumps(seen))
    assert seen["answered"] > REQUESTS * 0.55
    assert seen["streamed"] > 5
    assert seen["retracted"] > 0
    assert status["failures"] == {"refreshes": 0, "batches": 0, "integrity": 0}
    flush(small)
