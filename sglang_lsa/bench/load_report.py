"""Results of ``sglang-lsa bench load``: what is compared, a table, and a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sglang_lsa.bench.report import Results, ratios_text
from sglang_lsa.bench.server_args import and_arguments, with_arguments
from sglang_lsa.bench.systems import SYSTEMS, Comparison, Row, backends, compare, is_lsa, upgraded

ARM = (
    "model",
    "mix",
    "memories",
    "pool_gb",
    "kv_dtype",
    "max_running",
    "rate_per_s",
    "seconds",
    "objective_ttft_s",
    "objective_tpot_ms",
    "gpu",
    "server_args",
)
"""What rows must have in common to be compared: their servers got the same arguments, and the same requests."""


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Goodput of LSA for one of stock's, where stock has any."""
    some = [row for row in rows if is_lsa(row) or row["met_objective"]]
    return compare(
        some, ARM, lambda row: -row["goodput_per_s"], lambda stock, lsa: lsa["goodput_per_s"] / stock["goodput_per_s"]
    )


def table(rows: Sequence[Row]) -> Table:
    """What a reader wants first: every system at every rate."""
    shown = Table(title="under load" + "".join(f", {gpu}" for gpu in sorted({row["gpu"] for row in rows})))
    for name in ("model", "mix", "pool GB", "rate/s", "system", "backend"):
        shown.add_column(name)
    for name in ("requests", "met", "late", "refused", "done/s", "tokens/s", "TTFT p50 s", "p99 s"):
        shown.add_column(name, justify="right")
    for name in ("ITL p50 ms", "p99 ms", "running", "max", "retracted", "goodput/s", "over"):
        shown.add_column(name, justify="right")
    found = {id(each.row): each for each in comparisons(rows)}
    for row in sorted(rows, key=_place):
        shown.add_row(
            row["model"],
            row["mix"] + (f" {row['memories']}" if row["memories"] else ""),
            f"{row['pool_gb']:g}",
            f"{row['rate_per_s']:g}",
            row["system"] + and_arguments(row, "\n"),
            backends(row),
            str(row["requests"]),
            str(row["met_objective"]),
            str(row["late"]),
            str(row["refused"]),
            f"{row['completed_per_s']:.2f}",
            f"{row['output_tokens_per_s']:.0f}",
            _number(row["ttft_s_p50"], ".2f"),
            _number(row["ttft_s_p99"], ".2f") + ("+" if row["no_first_token"] else ""),
            _number(row["itl_ms_p50"], ".1f"),
            _number(row["itl_ms_p99"], ".1f"),
            _number(row["running_mean"], ".1f"),
            _number(row["running_max"], "d"),
            str(row["retractions"]),
            f"{row['goodput_per_s']:.2f}",
            ratios_text(found[id(row)]) if id(row) in found else "",
        )
    return shown


def plot(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """A line of pictures for every model and mix: goodput, and the 99th percentile of TTFT, over the rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = sorted({(row["model"], row["mix"]) for row in rows}) or [("", "")]
    figure, axes = pyplot.subplots(len(lines), 2, figsize=(11, 4 * len(lines)), squeeze=False)
    for (model, mix), (left, right) in zip(lines, axes, strict=True):
        mine = [row for row in rows if (row["model"], row["mix"]) == (model, mix)]
        _draw(left, mine, "goodput_per_s")
        _draw(right, mine, "ttft_s_p99")
        objective = sorted({(row["objective_ttft_s"], row["objective_tpot_ms"]) for row in mine})
        within = ", ".join(f"TTFT {ttft:g} s, {tpot:g} ms a token" for ttft, tpot in objective)
        left.set(title=f"{model} {mix}: within {within}", ylabel="requests/s that met it", xlabel="requests/s")
        right.set(title=f"{model} {mix}", ylabel="TTFT p99 (s)", xlabel="requests/s", yscale="log")
        if mine:
            left.legend(fontsize=7)
    figure.suptitle(", ".join(sorted({row["gpu"] for row in rows})))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(axis: Any, rows: Sequence[Row], name: str) -> None:
    """A line for every system and everything but the rate that tells rows apart."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=_place):
        kind = "" if row["kv_dtype"] == "bfloat16" else f", {row['kv_dtype']}"
        label = f"{row['system']} ({backends(row)}{kind}, {row['pool_gb']:g} GB{and_arguments(row, ', ')})"
        lines.setdefault(label, []).append(row)
    for label, mine in lines.items():
        seen = [(row["rate_per_s"], row[name]) for row in mine if row[name] is not None]
        axis.plot([x for x, _ in seen], [y for _, y in seen], "s-" if is_lsa(mine[0]) else "o--", label=label)


def _place(row: Row) -> tuple[Any, ...]:
    return (*(row[name] for name in ARM), list(SYSTEMS).index(row["system"]))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def upgrade(row: Row) -> Row:
    """A row as it is written now."""
    return with_arguments(upgraded(row))


LOAD = Results("load", (*ARM, "system"), "goodput_gain", comparisons, plot, upgrade)
