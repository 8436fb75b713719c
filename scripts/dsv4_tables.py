"""Tables of ``docs/results/dsv4.json`` for pages; ``scripts/figures.py`` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_lsa.bench.dsv4_shapes import DSV4_SHAPES
from sglang_lsa.memory.layout.dsv4 import PAGE_TOKENS

PAPER = {"256k": (1.6, 1.7), "512k": (2.4, 2.0), "1m": (2.7, 2.8)}
"""Requests and tokens a second of LSA over those of its rival (arXiv 2606.09079), by arm."""
KV_GB = 20.0


def speed(rows: Sequence[dict[str, Any]]) -> str:
    """Of one context a line: SGLang with its smallest windows, and LSA with a tenth of each set replaced a window."""
    lines = [
        "| tokens of a prefix | requests at once: SGLang, LSA | tokens a second | gain (paper) | other churns: 0, 30 % "
        "| ms per token | recall GB/s | part of the growing KV that requests hold on the GPU; as the paper counts "
        "| all pools for it | host GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ("256k", "512k", "1m", "1x1m"):
        here = [row for row in rows if row["arm"] == arm and row["kv_gb"] == KV_GB]
        stock = next(row for row in here if row["system"] == "stock-tuned")
        lsa = {row["churn"]: row for row in here if row["system"] == "lsa"}
        row = lsa[0.1]
        paper = PAPER.get(arm)
        lines.append(
            "| "
            + " | ".join(
                (
                    f"{row['context']:,}" + ("" if paper else ", one request"),
                    f"{stock['running_requests']}, {row['running_requests']}"
                    + (f" ({row['running_requests'] / stock['running_requests']:.1f}x; {paper[0]}x)" if paper else ""),
                    f"{stock['decode_tokens_per_s']:,.0f}, {row['decode_tokens_per_s']:,.0f}",
                    f"**{row['gain']:.2f}x**" + (f" ({paper[1]}x)" if paper else ""),
                    ", ".join(f"{lsa[churn]['gain']:.2f}x" for churn in (0.0, 0.3)),
                    f"{stock['tpot_ms_p50']:.1f}, {row['tpot_ms_p50']:.1f} (p99 {row['tpot_ms_p99']:.1f})",
                    f"{row['recall_bytes_per_s'] / 1e9:.2f}",
                    f"{row['gpu_share']:.1%}; {row['gpu_share_nominal']:.1%}" if paper else "",
                    f"{pool_share(row):.1%}" if paper else "",
                    f"{row['host_bytes'] / 1e9:.0f}",
                )
            )
            + " |"
        )
    return "\n".join(lines)


def pool_share(row: dict[str, Any]) -> float:
    """Device bytes of all pools for KV that grows with contexts, and of what LSA has beside, over what the prefixes
    would take whole."""
    shape = DSV4_SHAPES[row["model"]]
    taken = sum(row[f"{name}_bytes"] for name in ("c4_kv", "c4_index", "c128_kv", "swa_map", "lsa_overhead"))
    pages = row["distinct_prefixes"] * row["context"] // PAGE_TOKENS
    return float(taken / (pages * (shape.page_bytes + shape.rest_bytes)))
