"""Results of the serving benchmark: JSON, CSV, a table, and a plot."""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

NAME = "serving"
KEY = ("model", "workload", "context", "batch", "system", "policy")
"""What identifies a row: a later measurement of the same replaces it."""


def read(folder: pathlib.Path, name: str = NAME) -> list[dict[str, Any]]:
    """Rows of earlier runs; none when there is no file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def write(
    folder: pathlib.Path,
    rows: Sequence[dict[str, Any]],
    name: str = NAME,
    key: Sequence[str] = KEY,
    draw: Callable[[pathlib.Path, Sequence[dict[str, Any]]], None] | None = None,
) -> None:
    """Merge ``rows`` into ``<name>.json``, and write ``<name>.csv`` and ``<name>.png`` from all of them.

    Args:
        key: columns that identify a row: one with the same values replaces it.
        draw: makes the picture; the serving benchmark's unless given.
    """
    merged = {tuple(str(row[column]) for column in key): row for row in (*read(folder, name), *rows)}
    everything = sorted(merged.values(), key=lambda row: tuple((row[k] is None, row[k] or 0) for k in key))
    (folder / f"{name}.json").write_text(json.dumps(everything, indent=1) + "\n")
    columns = list(dict.fromkeys(column for row in everything for column in row))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(everything)
    (draw or plot)(folder / f"{name}.png", everything)


def pairs(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every LSA row with the stock row of the same arm."""
    stock = {tuple(row[name] for name in KEY[:4]): row for row in rows if row["system"] == "stock"}
    return [
        (stock[arm], row)
        for row in rows
        if row["system"] == "lsa" and (arm := tuple(row[name] for name in KEY[:4])) in stock
    ]


def gain(stock: dict[str, Any], lsa: dict[str, Any]) -> float:
    """How much better LSA is: time per token for ``tpot``, tokens a second otherwise."""
    if stock["workload"] == "tpot":
        return stock["tpot_ms_p50"] / lsa["tpot_ms_p50"]
    return lsa["decode_tokens_per_s"] / stock["decode_tokens_per_s"]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """What a reader wants first."""
    shown = Table(title="stock SGLang → LSA")
    for name in ("model", "workload", "batch x context", "policy", "running", "tokens/s", "TPOT p50 ms", "p99 ms"):
        shown.add_column(name)
    for name in ("gain", "KV GB", "recall GB/s", "hidden", "refresh", "stalls"):
        shown.add_column(name, justify="right")
    for stock, lsa in pairs(rows):
        shown.add_row(
            lsa["model"],
            lsa["workload"],
            f"{lsa['batch']} x {lsa['context']:,}",
            lsa["policy"],
            f"{stock['running_requests']} → {lsa['running_requests']}",
            f"{stock['decode_tokens_per_s']:.0f} → {lsa['decode_tokens_per_s']:.0f}",
            f"{stock['tpot_ms_p50']:.2f} → {lsa['tpot_ms_p50']:.2f}",
            f"{stock['tpot_ms_p99']:.2f} → {lsa['tpot_ms_p99']:.2f}",
            f"{gain(stock, lsa):.2f}x",
            f"{stock['kv_gpu_bytes'] / 1e9:.1f} → " + _number(lsa["kv_gpu_bytes"] and lsa["kv_gpu_bytes"] / 1e9, ".1f"),
            _number(lsa.get("recall_gbps"), ".1f"),
            _number(lsa.get("recall_hidden_fraction"), ".1%"),
            _number(lsa.get("refresh_fraction"), ".2%"),
            str(lsa["stalls"]),
        )
    return shown


def plot(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Time per token over context, and requests that run at once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = sorted({row["model"] for row in rows})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for model in models:
        for system, style in (("stock", "o--"), ("lsa", "s-")):
            mine = [
                row
                for row in rows
                if row["model"] == model
                and row["system"] == system
                and row["workload"] == "tpot"
                and row["batch"] == 1
                and row["policy"] in (None, "quest")
            ]
            mine.sort(key=lambda row: row["context"])
            if mine:
                axes[0].plot(
                    [row["context"] for row in mine],
                    [row["tpot_ms_p50"] for row in mine],
                    style,
                    label=f"{system} {model}",
                )
    axes[0].set(xscale="log", xlabel="context (tokens)", ylabel="ms per token, batch 1", title="time per output token")
    if axes[0].lines:
        axes[0].legend()
    bars = [(s, lsa) for s, lsa in pairs(rows) if lsa["workload"] != "tpot" and lsa["policy"] == "quest"]
    names = [f"{lsa['workload']} {lsa['model']}\n{lsa['context']:,}" for _, lsa in bars]
    places = range(len(bars))
    for offset, which in ((-0.2, 0), (0.2, 1)):
        values = [pair[which]["decode_tokens_per_s"] for pair in bars]
        drawn = axes[1].bar([place + offset for place in places], values, 0.4, label=("stock", "lsa")[which])
        axes[1].bar_label(drawn, [f"{pair[which]['running_requests']} running" for pair in bars], fontsize=7)
    axes[1].set(ylabel="tokens per second", title="same KV pool, as many requests as fit")
    axes[1].set_xticks(list(places), names)
    if bars:
        axes[1].legend()
    figure.suptitle(rows[0]["gpu"] if rows else "")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
