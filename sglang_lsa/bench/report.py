"""Results of a benchmark against stock SGLang: JSON, CSV, a table, and a plot; here those of ``bench serving``."""

from __future__ import annotations

import csv
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sglang_lsa.bench.server_args import and_arguments, told_apart, with_arguments
from sglang_lsa.bench.systems import SYSTEMS, Comparison, Row, backends, compare, is_lsa, upgraded

ARM = ("model", "workload", "context", "batch", "kv_dtype", "tp", "gpu", "server_args")
"""What rows must have in common to be compared: their servers got the same arguments, and the same requests."""
Draw = Callable[[pathlib.Path, Sequence[Row]], None]


@dataclass(frozen=True)
class Results:
    """How a benchmark keeps its rows.

    Attributes:
        name: of its files.
        key: columns that identify a row: a later measurement of the same replaces it.
        ratio: name of the columns with LSA's ratio to the fastest stock system and to each.
        compare: finds those ratios.
        draw: makes the picture.
        upgrade: brings a row of an earlier version up to date.
    """

    name: str
    key: tuple[str, ...]
    ratio: str
    compare: Callable[[Sequence[Row]], list[Comparison]]
    draw: Draw
    upgrade: Callable[[Row], Row] = upgraded

    def identity(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in self.key)

    def read(self, folder: pathlib.Path) -> list[Row]:
        """Rows of earlier runs; none when there is no file."""
        path = folder / f"{self.name}.json"
        return [self.upgrade(row) for row in json.loads(path.read_text())] if path.exists() else []

    def write(self, folder: pathlib.Path, rows: Sequence[Row]) -> None:
        """Merge ``rows`` into ``<name>.json``, and write ``<name>.csv`` and ``<name>.png`` from all of them."""
        self.draw(folder / f"{self.name}.png", self.keep(folder, rows))

    @contextmanager
    def drawn(self, folder: pathlib.Path) -> Iterator[None]:
        """Rows are kept inside; the picture has all of them at the end, also when that is an interrupt's."""
        try:
            yield
        finally:
            if rows := self.read(folder):
                self.draw(folder / f"{self.name}.png", rows)

    def keep(self, folder: pathlib.Path, rows: Sequence[Row]) -> list[Row]:
        """:meth:`write` without the picture, which takes a second: for every row while a benchmark runs."""
        merged = {self.identity(row): row for row in (*self.read(folder), *rows)}
        everything = self.with_ratios(
            sorted(
                merged.values(),
                key=lambda row: tuple((row[k] is None, 0 if row[k] is None else row[k]) for k in self.key),
            )
        )
        path = folder / f"{self.name}.json"
        part = path.with_suffix(".part")  # a run that is cut while it writes keeps what it had
        part.write_text(json.dumps(everything, indent=1) + "\n")
        os.replace(part, path)
        columns = list(dict.fromkeys(column for row in everything for column in row))
        with (folder / f"{self.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(everything)
        return everything

    def with_ratios(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, those of LSA with their ratios to what is among the rows now."""
        plain = [{name: value for name, value in row.items() if not name.startswith(self.ratio)} for row in rows]
        facts = {id(found.row): found.facts(self.ratio) for found in self.compare(plain)}
        return [row | facts.get(id(row), {}) for row in plain]

    def measured(self, folder: pathlib.Path, resume: bool) -> set[tuple[str, ...]]:
        """What ``--resume`` need not measure again: :meth:`identity` of the rows that are there."""
        return {self.identity(row) for row in self.read(folder)} if resume else set()


def upgrade(row: Row) -> Row:
    """A row as it is written now: before rows named its ranks, every server had one."""
    return {"tp": 1} | with_arguments(upgraded(row))


def gain(stock: Row, lsa: Row) -> float:
    """How much better LSA is: time per token for ``tpot``, tokens a second otherwise."""
    return cost(stock) / cost(lsa)


def cost(row: Row) -> float:
    """Milliseconds per token of a request for ``tpot``, seconds per token of all requests otherwise."""
    return row["tpot_ms_p50"] if row["workload"] == "tpot" else 1 / row["decode_tokens_per_s"]


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    return compare(rows, ARM, cost, gain)


def ratios_text(found: Comparison, join: str = "\n") -> str:
    """For a table: every stock system, the fastest first."""
    return join.join(f"{found.ratios[name]:.2f}x {name}" for name in found.rivals)


def table(rows: Sequence[Row]) -> Table:
    """What a reader wants first: every system of an arm, and LSA against each of stock's."""
    shown = Table(title="stock SGLang and LSA" + "".join(f", {gpu}" for gpu in sorted({row["gpu"] for row in rows})))
    for name in ("model", "TP", "workload", "batch x context", "system", "backend", "KV", "page", "policy"):
        shown.add_column(name)
    for name in ("running", "tokens/s", "TPOT p50 ms", "p99 ms", "gain over", "KV GB"):
        shown.add_column(name, justify="right")
    for name in ("recall GB/s", "hidden", "refresh", "stalls"):
        shown.add_column(name, justify="right")
    found = {id(each.row): each for each in comparisons(rows)}
    for row in sorted(rows, key=lambda row: (*(str(row[column]).zfill(8) for column in ARM), is_lsa(row))):
        shown.add_row(
            row["model"],
            str(row["tp"]),
            row["workload"],
            f"{row['batch']} x {row['context']:,}",
            row["system"] + and_arguments(row, "\n"),
            backends(row),
            row["kv_dtype"],
            str(row["page_size"]),
            row["policy"] or "",
            str(row["running_requests"]),
            f"{row['decode_tokens_per_s']:.0f}",
            f"{row['tpot_ms_p50']:.2f}",
            f"{row['tpot_ms_p99']:.2f}",
            ratios_text(found[id(row)]) if id(row) in found else "",
            _number(row["kv_gpu_bytes"] and row["kv_gpu_bytes"] / 1e9, ".1f"),
            _number(row.get("recall_gbps"), ".1f"),
            _number(row.get("recall_hidden_fraction"), ".1%"),
            _number(row.get("refresh_fraction"), ".2%"),
            str(row.get("stalls", "-")),
        )
    return shown


def plot(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Time per token over context, and requests that run at once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), width_ratios=(2, 3))
    shown = [row for row in rows if row["policy"] in (None, "quest")]
    _draw_pace(axes[0], [row for row in shown if row["workload"] == "tpot" and row["batch"] == 1])
    _draw_throughput(axes[1], [row for row in shown if row["workload"] != "tpot"])
    figure.suptitle(", ".join(sorted({row["gpu"] for row in rows})))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _label(row: Row) -> str:
    kind = "" if row["kv_dtype"] == "bfloat16" else f", {row['kv_dtype']}"
    ranks = "" if row["tp"] == 1 else f", TP {row['tp']}"
    return f"{row['system']} ({backends(row)}{kind}{ranks})"


def _draw_pace(axis: Any, rows: Sequence[Row]) -> None:
    lines: dict[str, list[Row]] = {}
    label_of = told_apart(rows, lambda row: f"{row['model']} {_label(row)}")
    for row in sorted(rows, key=lambda row: (row["model"], list(SYSTEMS).index(row["system"]), row["context"])):
        lines.setdefault(label_of(row), []).append(row)
    for color, (label, mine) in zip(_colors(len(lines)), lines.items(), strict=True):
        style = "s-" if is_lsa(mine[0]) else "o--"
        pace = [row["tpot_ms_p50"] for row in mine]
        axis.plot([row["context"] for row in mine], pace, style, label=label, color=color)
    axis.set(xscale="log", xlabel="context (tokens)", ylabel="ms per token, batch 1", title="time per output token")
    if lines:
        _legend(axis)


def _draw_throughput(axis: Any, rows: Sequence[Row]) -> None:
    label_of, sent = told_apart(rows, _label), [column for column in ARM if column != "server_args"]
    arms = sorted({tuple(row[column] for column in sent) for row in rows})
    labels = sorted({label_of(row) for row in rows}, key=lambda label: (list(SYSTEMS).index(label.split()[0]), label))
    of_arm = [[row for row in rows if tuple(row[column] for column in sent) == arm] for arm in arms]
    width = 0.85 / max((len(members) for members in of_arm), default=1)
    for color, label in zip(_colors(len(labels)), labels, strict=True):
        places, mine = [], []
        for number, members in enumerate(of_arm):
            members = sorted(members, key=lambda row: labels.index(label_of(row)))
            for place, row in enumerate(members):
                if label_of(row) == label:
                    places.append(number + (place - (len(members) - 1) / 2) * width)
                    mine.append(row)
        drawn = axis.bar(places, [row["decode_tokens_per_s"] for row in mine], width, label=label, color=color)
        axis.bar_label(drawn, [str(row["running_requests"]) for row in mine], fontsize=7)
    axis.set(ylabel="tokens per second", title="same KV pool, as many requests as fit (above each bar: how many run)")
    axis.set_xticks(range(len(arms)), [_sent(dict(zip(sent, arm, strict=True))) for arm in arms], fontsize=7)
    if labels:
        _legend(axis)


def _sent(arm: Row) -> str:
    """What was sent, for a place of the picture: model, requests and their tokens, and what is not the usual."""
    kind = [] if arm["kv_dtype"] == "bfloat16" else [arm["kv_dtype"]]
    ranks = [] if arm["tp"] == 1 else [f"TP {arm['tp']}"]
    lines = [f"{arm['model']} {arm['workload']}", f"{arm['batch']} x {round(arm['context'] / 1000)}K"]
    return "\n".join((*lines, ", ".join((*kind, *ranks))))


def _colors(number: int) -> Iterator[Any]:
    """So many that are told apart."""
    from matplotlib import colormaps

    if number > 20:
        return (colormaps["turbo"](place / (number - 1)) for place in range(number))
    return iter(colormaps["tab20" if number > 10 else "tab10"].colors[:number])  # type: ignore[attr-defined]


def _legend(axis: Any) -> None:
    """Below: nothing that is drawn is hidden."""
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


SERVING = Results("serving", (*ARM, "system", "policy"), "gain", comparisons, plot, upgrade)
