"""Results of ``sglang-lsa bench prefill``: what is compared, a table, and a plot."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from rich.table import Table

from sglang_lsa.bench.prefill_groups import MEMORY, PROMPT, QUESTION
from sglang_lsa.bench.report import Results, ratios_text
from sglang_lsa.bench.server_args import and_arguments, told_apart, with_arguments
from sglang_lsa.bench.systems import Comparison, Row, backends, compare, upgraded
from sglang_lsa.memory.mirror import GB


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """New prompts, with LSA and with stock, whatever the pool: seconds of LSA for one of stock's."""
    prompts = [row for row in rows if row["workload"] == "ttft"]
    return compare(prompts, ARM, lambda row: row["ttft_s"], lambda stock, lsa: lsa["ttft_s"] / stock["ttft_s"])


def speedups(rows: Sequence[Row]) -> dict[int, float]:
    """How many times as fast as exact ones resident questions are, by the row's ``id``."""
    same = ("model", "system", "kv_dtype", "gpu", "server_args", "pool_tokens", "context", "device")
    questions = [row for row in rows if row["workload"] == "question"]
    exact = {tuple(row[name] for name in same): row["ttft_s"] for row in questions if row["prefill"] == "exact"}
    return {
        id(row): exact[arm] / row["ttft_s"]
        for row in questions
        if row["prefill"] == "resident" and (arm := tuple(row[name] for name in same)) in exact
    }


def ratios(rows: Sequence[Row], join: str = "\n") -> dict[int, str]:
    """What stands beside a time, by the row's ``id``."""
    found = {id(each.row): ratios_text(each, join) for each in comparisons(rows)}
    return found | {key: f"{ratio:.2f}x faster" for key, ratio in speedups(rows).items()}


def table(rows: Sequence[Row]) -> Table:
    """What a reader wants first."""
    shown = Table(title="time to first token" + "".join(f", {gpu}" for gpu in sorted({row["gpu"] for row in rows})))
    for name in ("model", "system", "backend", "KV", "page", "pool", "what", "tokens", "prefill", "device"):
        shown.add_column(name)
    for name in ("TTFT s", "ratio", "streamed GB", "recalled GB", "staging MB"):
        shown.add_column(name, justify="right")
    beside = ratios(rows)
    for row in rows:
        shown.add_row(
            row["model"],
            row["system"] + and_arguments(row, "\n"),
            backends(row),
            row["kv_dtype"],
            str(row["page_size"]),
            f"{row['pool']} {row['kv_pool_bytes'] / GB:.1f} GB",
            row["workload"],
            f"{row['context']:,}",
            row["prefill"] or "",
            row["device"] or "",
            f"{row['ttft_s']:.3f}",
            beside.get(id(row), ""),
            *(f"{row[name] / unit:.1f}" if name in row else "-" for name, unit in _COLUMNS),
        )
    return shown


_COLUMNS = (("streamed_bytes", GB), ("recalled_bytes", GB), ("staging_bytes", 1 << 20))


def plot(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Bars: prefill of one prompt over pools, and questions about a memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    beside = ratios(rows)
    titles = {"ttft": "a new prompt", "question": f"a question of {QUESTION:,} tokens about {MEMORY:,} cached ones"}
    for axis, (workload, title) in zip(axes, titles.items(), strict=True):
        mine = [row for row in rows if row["workload"] == workload]
        name_of = told_apart(mine, _name)
        bars = axis.bar(range(len(mine)), [row["ttft_s"] for row in mine])
        axis.bar_label(bars, [f"{row['ttft_s']:.2f} s\n{beside.get(id(row), '')}" for row in mine], fontsize=6)
        axis.set_xticks(range(len(mine)), [name_of(row) for row in mine], fontsize=6)
        axis.set(title=title, ylabel="seconds to the first token")
        axis.margins(y=0.2)
    figure.suptitle(", ".join(sorted({f"{row['gpu']}, {row['model'].upper()} shape" for row in rows})))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _name(row: Row) -> str:
    """Under its bar."""
    what = f"{row['pool']} {row['kv_pool_bytes'] / GB:.0f} GB\n{row['context']:,}"
    if row["workload"] == "question":
        what = f"{row['prefill']}\n{row['device']}"
    return f"{row['system']}\n{backends(row)}\n{what}"


def upgrade(row: Row) -> Row:
    """A row as it is written now."""
    pools = {140_032: "full", PROMPT // 4: "quarter", PROMPT: "16gb"}
    return {"pool": pools.get(row["pool_tokens"], "other")} | with_arguments(upgraded(row))


ARM = ("model", "context", "kv_dtype", "gpu", "server_args")
"""What rows of new prompts must have in common to be compared: stock's pool holds the prompt, LSA's need not."""
KEY = ("model", "system", "pool", "workload", "context", "prefill", "device", "kv_dtype", "gpu", "server_args")
PREFILL = Results("prefill", KEY, "ttft_ratio", comparisons, plot, upgrade)
