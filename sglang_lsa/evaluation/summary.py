"""Accuracy by suite, task, length and arm, against full attention on the same questions."""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sglang_lsa.evaluation.analysis import union_of_sets
from sglang_lsa.evaluation.arms import EVIDENCE, FULL
from sglang_lsa.evaluation.divergence import summary as mean_and_interval

LEAST_FULL = 30.0
"""A task of which full attention itself gets fewer points of 100 is reported, and does not count in averages."""
AVERAGE = "average"
ALL = "all"
"""What the average over the tasks of all suites has for a suite."""
RESAMPLES = 10_000
MEANS = ("evidence_kept", "footprint", "resident", "device_bytes", "host_bytes", "ttft", "tpot", "kl_outside")
RUN = ("command", "hardware", "commit", "date")
"""What is known of the run that a row is of."""


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows ``suite, task, length, model, arm, budget, accuracy, delta, delta_ci_low, delta_ci_high, n, counted`` and
    means of the share of the evidence that was resident, footprint, bytes and times; points of 100, a 95 % interval by
    bootstrap over samples. Of tasks with several questions about one context also ``resident_union``, the share of it
    that their first sets have together. Of tasks without right answers, which tell how much of the evidence is kept,
    accuracy and what is derived from it are None. ``kl`` is the mean divergence of next-token distributions from full
    attention's, see ``divergence``, with its interval, over the ``kl_n`` questions that it is known of under every arm
    that has it at all; None where unknown.

    Only questions that every arm of their task answered count. Then, for every length, the average over the tasks that
    count: of each suite, and of suite ``all``; of arms that all of these tasks have.

    Args:
        rows: of ``run.Evaluation``, of one run or several.
    """
    rows = comparable(rows)
    scored = complete([row for row in rows if row["score"] is not None])
    cells = _group(scored, _cell)
    found = [_unscored(own) for own in _group([r for r in rows if r["score"] is None], _arm_of_cell).values()]
    averaged: dict[tuple[str, str, int], list[_Cell]] = {}
    for (model, suite, task, length), members in sorted(cells.items()):
        cell = _Cell(members)
        counted = FULL in cell.scores and cell.accuracy(FULL) >= LEAST_FULL and members[0]["averaged"]
        found += cell.rows({"suite": suite, "task": task, "length": length, "model": model, "counted": counted})
        if counted:
            for name in (suite, ALL):
                averaged.setdefault((model, name, length), []).append(cell)
    for (model, suite, length), members_of in sorted(averaged.items()):
        found += _average(
            members_of, {"suite": suite, "task": AVERAGE, "length": length, "model": model, "counted": True}
        )
    return found


def complete(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of questions that every arm of their task and length has answered, but for evidence, which not all have."""
    found: list[dict[str, Any]] = []
    for members in _group(rows, _cell).values():
        labels = {row["label"] for row in members if row["arm"] != EVIDENCE}
        for own in _group(members, lambda row: (row["sample"], row["turn"])).values():
            if labels <= {row["label"] for row in own}:
                found += own
    return found


def comparable(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, without the divergence of questions of which an arm of their task lacks it, though it has it of
    others: an answer of one token has none, and a run that compared nothing."""
    found: list[dict[str, Any]] = []
    for members in _group(rows, _cell).values():
        labels = {row["label"] for row in members if row.get("kl") is not None and row["arm"] != EVIDENCE}
        for own in _group(members, lambda row: (row["sample"], row["turn"])).values():
            known = {row["label"] for row in own if row.get("kl") is not None}
            found += own if labels <= known else [row | {"kl": None, "kl_outside": None} for row in own]
    return found


def _arm_of_cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return *_cell(row), row["label"]


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["suite"], row["task"], row["length"]


class _Cell:
    """One task at one length: scores by arm, one number a sample, which is the mean of its turns. Arms that did not
    answer every question are left out."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        by_label = _group(rows, lambda row: row["label"])
        most = max(map(len, by_label.values()))
        self.rows_of = {label: own for label, own in by_label.items() if len(own) == most}
        self.scores: dict[str, np.ndarray] = {}
        for label, own in self.rows_of.items():
            samples = _group(own, lambda row: row["sample"])
            means = [np.mean([row["score"] for row in samples[name]]) for name in sorted(samples)]
            self.scores[label] = np.array(means) * 100
        _, suite, task, length = _cell(rows[0])
        rng = np.random.default_rng(zlib.crc32(f"{suite}-{task}-{length}".encode()))
        number = len({row["sample"] for row in rows})
        self.drawn = rng.integers(0, number, (RESAMPLES, number))

    def accuracy(self, label: str) -> float:
        return float(self.scores[label].mean())

    def resampled_delta(self, label: str) -> np.ndarray:
        """``[RESAMPLES]``."""
        return (self.scores[label] - self.scores[FULL])[self.drawn].mean(axis=1)

    def rows(self, about: dict[str, Any]) -> list[dict[str, Any]]:
        if FULL not in self.scores:
            return []
        return [
            _row(about, own, [self.accuracy(label)], [self.accuracy(FULL)], self.resampled_delta(label))
            | {"resident_union": _union(own)}
            for label, own in self.rows_of.items()
        ]


def _average(cells: Sequence[_Cell], about: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for label in cells[0].rows_of:
        if not all(label in cell.rows_of for cell in cells):
            continue
        own = [row for cell in cells for row in cell.rows_of[label]]
        drawn = np.mean([cell.resampled_delta(label) for cell in cells], axis=0)
        accuracies, full = ([cell.accuracy(name) for cell in cells] for name in (label, FULL))
        found.append(_row(about, own, accuracies, full, drawn) | {"tasks": len(cells)})
    return found


def _row(
    about: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    accuracies: Sequence[float],
    full: Sequence[float],
    drawn: np.ndarray,
) -> dict[str, Any]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    accuracy = float(np.mean(accuracies))
    scores: dict[str, float | None] = {
        "accuracy": round(accuracy, 2),
        "delta": round(accuracy - float(np.mean(full)), 2),
        "delta_ci_low": round(float(low), 2),
        "delta_ci_high": round(float(high), 2),
    }
    return _described(about, rows, scores)


def _described(
    about: dict[str, Any], rows: Sequence[dict[str, Any]], scores: dict[str, float | None]
) -> dict[str, Any]:
    first = rows[0]
    return {
        **about,
        "arm": first["arm"],
        "budget": first["budget"],
        **scores,
        "n": len(rows),
        **{name: _mean(row.get(name) for row in rows) for name in MEANS},
        **_divergence(rows),
        **{name: first.get(name) for name in RUN},
    }


def _divergence(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """``kl``, ``kl_ci_low``, ``kl_ci_high``, ``kl_n``: one number a sample, the mean of its turns. Tasks weigh the
    same."""
    known = [row for row in rows if row.get("kl") is not None]
    if not known:
        return dict.fromkeys(("kl", "kl_ci_low", "kl_ci_high")) | {"kl_n": 0}
    groups = []
    for _, task in sorted(_group(known, _cell).items()):
        samples = sorted(_group(task, lambda row: row["sample"]).items())
        groups.append([float(np.mean([row["kl"] for row in own])) for _, own in samples])
    rng = np.random.default_rng(zlib.crc32("-".join(map(str, _cell(known[0]))).encode()))
    names = ("kl", "kl_ci_low", "kl_ci_high")
    values = mean_and_interval(groups, rng, RESAMPLES)
    return {**dict(zip(names, (round(value, 7) for value in values), strict=True)), "kl_n": len(known)}


def _union(rows: Sequence[dict[str, Any]]) -> float | None:
    """Mean of samples with several questions about one context; None if there are none."""
    samples = _group(rows, lambda row: row["sample"]).values()
    return _mean(union_of_sets(row.get("sets") or "" for row in own) for own in samples if len(own) > 1)


def _unscored(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    about = {name: rows[0][name] for name in ("suite", "task", "length", "model")}
    nothing: dict[str, float | None] = dict.fromkeys(("accuracy", "delta", "delta_ci_low", "delta_ci_high"))
    return _described({**about, "counted": False}, rows, nothing)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 5) if known else None


def _group(rows: Iterable[dict[str, Any]], of: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(of(row), []).append(row)
    return groups


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """One table of averages, and one of tasks: arms by length."""
    lines = []
    for title, chosen in (
        ("Averages", [row for row in found if row["task"] == AVERAGE]),
        ("Tasks", [row for row in found if row["task"] != AVERAGE]),
    ):
        if not chosen:
            continue
        lengths = sorted({row["length"] for row in chosen})
        lines += [f"### {title}", "", f"| model | suite | task | arm | {' | '.join(map(str, lengths))} |"]
        lines.append("| --- " * (4 + len(lengths)) + "|")
        cells = _group(chosen, lambda row: (row["model"], row["suite"], row["task"], row["arm"], row["budget"]))
        for (model, suite, task, arm, budget), members in cells.items():
            by_length = {row["length"]: row for row in members}
            shown = [_shown(by_length[length]) if length in by_length else "" for length in lengths]
            name = arm if arm == FULL else f"{arm} {budget:.1%}"
            lines.append(f"| {model} | {suite} | {task} | {name} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(row: dict[str, Any]) -> str:
    far = ""
    if row.get("kl") is not None:
        few = f", n {row['kl_n']}" if row["kl_n"] != row["n"] else ""
        far = f"; KL {row['kl']:.4f} ({row['kl_ci_low']:.4f} to {row['kl_ci_high']:.4f}{few})"
    if row["accuracy"] is None:
        kept = row["evidence_kept"]
        return (f"evidence {kept:.0%} (n {row['n']})" if kept is not None else f"(n {row['n']})") + far
    mark = "" if row["counted"] else " *"
    if row["arm"] == FULL:
        return f"{row['accuracy']:.1f} (n {row['n']}){mark}{far}"
    kept = f", {row['footprint']:.1%}" if row["footprint"] is not None else ""
    return f"{row['accuracy']:.1f} ({row['delta_ci_low']:+.1f} to {row['delta_ci_high']:+.1f}{kept}){mark}{far}"


def write_markdown(path: pathlib.Path, found: Sequence[dict[str, Any]]) -> None:
    """The tables, and how to read them."""
    told = (
        "\nAccuracy in points of 100; in brackets the 95 % interval of the difference to full attention on the same "
        "questions, and the device memory of the KV, selector keys, queries and tables, of what all KV takes. A star: "
        f"full attention itself is below {LEAST_FULL:.0f} there, so the task does not count in averages. "
        "*Evidence*: the share of its pages that was resident, of tasks without a right answer."
    )
    if any(row.get("kl") is not None for row in found):
        told += (
            " *KL*: of the next-token distribution from full attention's, in nats a token, along full attention's "
            "answer, with its 95 % interval; all tokens but the likeliest are one class, so it is a lower bound. Full "
            "attention's own is what rounding makes. It is over the questions of which it is known under "
            "every arm: *n*, where these are fewer."
        )
    path.write_text(markdown(found) + told + "\n")
