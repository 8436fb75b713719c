"""Rows of benchmarks, as tests make them."""

from __future__ import annotations

from typing import Any

GB = 1 << 30


def row(system: str, policy: str | None = None, **other: Any) -> dict[str, Any]:
    found = {
        "workload": "iso",
        "model": "8b",
        "system": system,
        "policy": policy,
        "context": 60_000,
        "batch": 13,
        "tp": 1,
        "running_requests": 4,
        "decode_tokens_per_s": 200.0,
        "tpot_ms_p50": 20.0,
        "tpot_ms_p99": 30.0,
        "kv_gpu_bytes": 32_000_000_000,
        "gpu": "GPU of a test",
        "server_args": "",
        **ATTENDING[system],
    }
    return found | ({"stalls": 2} if system == "lsa" else {}) | other


ATTENDING: dict[str, dict[str, Any]] = {
    system: {"prefill_backend": prefill, "decode_backend": decode, "kv_dtype": "bfloat16", "page_size": page}
    for system, prefill, decode, page in (
        ("stock", "fa3", "fa3", 1),
        ("stock-flashinfer", "flashinfer", "flashinfer", 1),
        ("lsa", "fa3", "flashinfer", 64),
    )
}
STOCK = row("stock")
LSA = row("lsa", "quest", running_requests=13, decode_tokens_per_s=650.0, tpot_ms_p50=16.0, recall_gbps=12.34)
