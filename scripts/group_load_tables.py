"""Tables of ``docs/results/group-quality.json`` and ``load.json`` for pages; ``scripts/figures.py`` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quality_tables import line, table

Row = dict[str, Any]
LENGTHS = {16384: "16K", 32000: "32,000"}
SYSTEMS = {"stock": "stock (FA3)", "stock-flashinfer": "stock (FlashInfer)", "lsa": "LSA", "lsa-paced": "LSA, paced"}
KINDS = {"one": "one number", "several": "six numbers"}


def group_answers(rows: Sequence[Row]) -> str:
    """Of one model, length and kind of question a line: full attention, separate and grouped sets, and what is read."""
    lines = table(
        "model, tokens, answer", "full", "separate", "grouped", "grouped against separate", "margin 0.2",
        "evidence read: separate, grouped", "pages a step of attention reads: full, separate, grouped",
        "different pages, MB: separate, grouped",
    )  # fmt: skip
    places = dict.fromkeys((row["model"], row["length"], row["kind"]) for row in rows if row["kind"] in KINDS)
    for model, length, kind in places:
        here = {row["arm"]: row for row in rows if (row["model"], row["length"], row["kind"]) == (model, length, kind)}
        full, apart, grouped = (here[arm] for arm in ("full", "separate", "grouped"))
        star = " *" if full["accuracy"] < 30 else ""
        lines.append(
            line(
                f"{model.split('-')[-2]}, {LENGTHS[length]}, {KINDS[kind]}",
                f"{full['accuracy']:.1f}{star}",
                f"{apart['accuracy']:.1f}",
                f"**{grouped['accuracy']:.1f}**",
                f"{grouped['separate_delta']:+.1f} ({grouped['separate_delta_ci_low']:+.1f} to "
                f"{grouped['separate_delta_ci_high']:+.1f})",
                f"{here['grouped 0.2']['accuracy']:.1f}" if "grouped 0.2" in here else "",
                f"{apart['evidence_read'] * 100:.0f} %, {grouped['evidence_read'] * 100:.0f} %",
                ", ".join(f"{row['attention_reads']:,.0f}" for row in (full, apart, grouped)),
                ", ".join(f"{row['union_bytes'] / 1e6:.0f}" for row in (apart, grouped)),
            )
        )
    return "\n".join(lines)


def load(rows: Sequence[Row], mix: str, title: str = "") -> str:
    """Of one rate and system a line; of one mix, which is what the table is about unless ``title`` says more.

    Raises:
        ValueError: none is of this mix.
    """
    mine = [row for row in rows if row["mix"] == mix]
    if not mine:
        raise ValueError(f"no row is of the mix {mix}, only of {sorted({row['mix'] for row in rows})}")
    lines = table(
        f"{title or mix}: requests a second", "system", "met the objective", "completed", "goodput a second",
        "tokens a second", "TTFT s: p50, p99", "ms between tokens: p50, p99", "running at most",
    )  # fmt: skip
    for row in sorted(mine, key=lambda row: (row["rate_per_s"], row["system"] != "stock")):
        waits = "+" if row["no_first_token"] else ""
        lines.append(
            line(
                f"{row['rate_per_s']:g}",
                SYSTEMS[row["system"]],
                f"{row['met_objective']} of {row['requests']}",
                str(row["completed"]),
                f"{row['goodput_per_s']:.2f}",
                f"{row['output_tokens_per_s']:.0f}",
                f"{row['ttft_s_p50']:.2f}, {row['ttft_s_p99']:.2f}{waits}",
                f"{row['itl_ms_p50']:.1f}, {row['itl_ms_p99']:.1f}",
                str(row["running_max"]),
            )
        )
    return "\n".join(lines)
