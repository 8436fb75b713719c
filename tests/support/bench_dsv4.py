"""What tests of ``bench dsv4`` ask for: plans and conditions of a benchmark without a GPU."""

from __future__ import annotations

from typing import Any

from sglang_lsa.bench import dsv4_measure
from sglang_lsa.bench.dsv4_arms import DSV4_ARMS, DSV4_SYSTEMS, Plan, plan
from sglang_lsa.bench.dsv4_shapes import DSV4_SHAPES

RANK = DSV4_SHAPES["rank"]
VOCABULARY = 1000


def planned(arm: str, system: str, kv_gb: float = 45, share: int = 1, tokens: int = 768) -> Plan:
    asked: dict[str, Any] = {"kv_bytes": int(kv_gb * 1e9), "tokens": tokens, "share": share, "budget": 0.1}
    return plan(DSV4_ARMS[arm], DSV4_SYSTEMS[system], RANK, **asked)


def asked_of(**other: Any) -> dsv4_measure.Asked:
    values: dict[str, Any] = {"shape": RANK, "weights": "bfloat16", "kv_gb": 45, "tokens": 64, "share": 1}
    return dsv4_measure.Asked(**(values | {"budget": 0.1, "churns": (0.0, 0.1)} | other))
