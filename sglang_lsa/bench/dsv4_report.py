"""Results of ``sglang-lsa bench dsv4``: columns that are compared, a table, and a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sglang_lsa.bench.dsv4_arms import DSV4_ARMS, DSV4_SYSTEMS
from sglang_lsa.bench.report import Results
from sglang_lsa.bench.server_args import and_arguments, told_apart, with_arguments
from sglang_lsa.bench.systems import Comparison, Row

SAME = ("model", "weights", "arm", "kv_gb", "share", "gpu", "server_args")
"""What rows must have in common to be compared: the same bytes for KV, and the same arguments, among it."""


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Every LSA row with those of SGLang; more is better, tokens a second."""
    found = []
    for row in rows:
        rivals = [other for other in rows if not _is_lsa(other) and all(other[name] == row[name] for name in SAME)]
        if _is_lsa(row) and rivals:
            rivals.sort(key=lambda other: -other["decode_tokens_per_s"])
            ratios = {other["system"]: row["decode_tokens_per_s"] / other["decode_tokens_per_s"] for other in rivals}
            found.append(Comparison(row, ratios, {other["system"]: other for other in rivals}))
    return found


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title="DeepSeek-V4, the same bytes of KV" + "".join(f", {gpu}" for gpu in _gpus(rows)))
    for name in ("model", "arm", "system", "churn"):
        shown.add_column(name)
    for name in ("KV GB", "running", "distinct", "tokens/s", "TPOT p50 ms", "p99 ms", "gain over"):
        shown.add_column(name, justify="right")
    for name in ("recall GB/s", "GPU share", "nominal", "host GB"):
        shown.add_column(name, justify="right")
    found = {id(each.row): each for each in comparisons(rows)}
    for row in sorted(rows, key=_place):
        gains = found[id(row)].ratios.items() if id(row) in found else ()
        shown.add_row(
            f"{row['model']} {row['weights']}",
            row["arm"],
            row["system"] + and_arguments(row, "\n"),
            "" if row["churn"] is None else f"{row['churn']:.0%}",
            f"{row['kv_bytes'] / 1e9:.1f}",
            str(row["running_requests"]),
            str(row["distinct_prefixes"]),
            f"{row['decode_tokens_per_s']:.0f}",
            f"{row['tpot_ms_p50']:.2f}",
            f"{row['tpot_ms_p99']:.2f}",
            "\n".join(f"{ratio:.2f}x {name}" for name, ratio in gains),
            f"{row['recall_bytes_per_s'] / 1e9:.2f}",
            _percent(row["gpu_share"]),
            _percent(row["gpu_share_nominal"]),
            f"{row['host_bytes'] / 1e9:.1f}",
        )
    return shown


def plot(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Tokens a second, and requests at once, for each context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [name for name in DSV4_ARMS if any(row["arm"] == name for row in rows)]
    label_of = told_apart(rows, _label)
    labels = list(dict.fromkeys(label_of(row) for row in sorted(rows, key=_place)))
    figure, axis = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / max(1, len(labels))
    for number, label in enumerate(labels):
        mine = [row for row in rows if label_of(row) == label]
        places = [arms.index(row["arm"]) + (number + 0.5) * width - 0.4 for row in mine]
        drawn = axis.bar(places, [row["decode_tokens_per_s"] for row in mine], width, label=label)
        axis.bar_label(drawn, [str(row["running_requests"]) for row in mine], fontsize=6)
    axis.set(ylabel="tokens per second", title="DeepSeek-V4, the same bytes of KV; above: requests at once")
    axis.set_xticks(range(len(arms)), [f"{name}\n{DSV4_ARMS[name].context:,}" for name in arms])
    if labels:
        axis.legend(fontsize=7)
    figure.suptitle(", ".join(_gpus(rows)), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _is_lsa(row: Row) -> bool:
    return DSV4_SYSTEMS[row["system"]].lsa


def _place(row: Row) -> tuple[Any, ...]:
    order = list(DSV4_ARMS).index(row["arm"]), list(DSV4_SYSTEMS).index(row["system"])
    return (row["model"], row["weights"], row["kv_gb"], row["share"], row["server_args"], *order, row["churn"] or 0)


def _label(row: Row) -> str:
    churn = "" if row["churn"] is None else f", {row['churn']:.0%} a window"
    shared = f", {row['share']} over each prefix" if row["share"] > 1 else ""
    return f"{row['model']} {row['system']}{churn}{shared}, {row['kv_gb']:g} GB"


def _gpus(rows: Sequence[Row]) -> list[str]:
    return sorted({row["gpu"] for row in rows})


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


DSV4 = Results("dsv4", (*SAME, "system", "budget", "churn"), "gain", comparisons, plot, with_arguments)
