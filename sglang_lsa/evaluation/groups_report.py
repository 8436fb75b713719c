"""What ``sglang-lsa bench groups`` found: accuracy by arm beside what a step reads. Pure, but for :func:`write`."""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from sglang_lsa.bench.server_args import and_arguments
from sglang_lsa.evaluation.analysis import evidence_kept
from sglang_lsa.evaluation.metrics import METRICS
from sglang_lsa.evaluation.paired import against_full
from sglang_lsa.evaluation.quality import by_run
from sglang_lsa.evaluation.summary import LEAST_FULL, RUN

FULL, SEPARATE = "full", "separate"
ALL = "all"
"""Kinds of questions together."""
NAME = "group-quality.json"
READ = ("set_pages", "pages", "union", "union_bytes", "held_bytes", "attention_reads", "exchanged", "groups", "members")
MEANS = (*READ, "evidence_read", "group_steps", "group_saved_reads", "group_added_reads", "seconds")
"""Of rounds; see ``union.what_was_read``."""
TITLES = (
    "model; policy; arguments",
    "tokens",
    "questions",
    "arm",
    "answer, tokens",
    "accuracy",
    "against full, 95 %",
    "against separate, 95 %",
    "evidence kept; read",
    "set, pages",
    "read apart, pages a step",
    "union, pages",
    "union, MB",
    "held, MB",
    "attention reads, pages a step",
    "exchanged a set",
    "groups (members)",
)


def summarise(rounds: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model, policy, budget, indexer, server's arguments, number of questions, length, kind and arm,
    and for all kinds together.

    Accuracy is in points of 100, and its difference to full attention (``full_delta``) and to separate sets
    (``separate_delta``) on the same questions has a 95 % interval by bootstrap over questions. Only documents that
    every arm was asked about count. What was read is a mean over documents. Kinds that full attention itself cannot do
    are there, and do not count in all.

    Args:
        rounds: as ``groups`` stores them; of the same document and arm, the last one counts.
    """
    found = []
    for about, own in _cells(list(rounds)):
        kinds = {kind: _complete([row for row in own if row["kind"] == kind]) for kind in _kinds(own)}
        rows = {kind: _rows(about | {"kind": kind}, members) for kind, members in kinds.items()}
        counted = [kind for kind, each in rows.items() if each and _counts(each)]
        if len(counted) > 1:
            together = _complete([row for row in own if row["kind"] in counted])
            found += [row | {"counted": True} for row in _rows(about | {"kind": ALL}, together)]
        found += [row | {"counted": kind in counted} for kind, each in rows.items() for row in each]
    return found


def _kinds(rounds: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in rounds))


def _counts(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether full attention can do what is asked, as in ``sglang-lsa eval``."""
    return all(row["accuracy"] >= LEAST_FULL for row in rows if row["arm"] == FULL)


def _cells(rounds: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Rounds to compare with each other: those of one way to choose sets, and those of full attention."""
    names, how = ("model", "questions", "length", "server_args"), ("policy", "budget", "indexer")
    last = {tuple(row[name] for name in (*names, *how, "kind", "document", "arm")): row for row in rounds}
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in last.values():
        if row["arm"] != FULL:
            cells.setdefault(tuple(row[name] for name in (*names, *how)), [])
    for which, cell in cells.items():
        for row in last.values():
            same = tuple(row[name] for name in names) == which[: len(names)]
            if same and (row["arm"] == FULL or tuple(row[name] for name in how) == which[len(names) :]):
                cell.append(row)
    ordered = sorted(cells, key=lambda which: tuple("" if part is None else part for part in which))
    return [(dict(zip((*names, *how), which, strict=True)), cells[which]) for which in ordered]


def _complete(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rounds of documents that every arm of these rounds was asked about."""
    arms = {row["arm"] for row in rounds}
    asked: dict[tuple[str, int], set[str]] = {}
    for row in rounds:
        asked.setdefault((row["kind"], row["document"]), set()).add(row["arm"])
    return [row for row in rounds if asked[row["kind"], row["document"]] == arms]


def _rows(about: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rounds = sorted(rounds, key=lambda row: (row["kind"], row["document"]))
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in rounds:
        by_arm.setdefault(row["arm"], []).append(row)
    scores = {arm: np.array([_score(each) for row in own for each in row["answers"]]) for arm, own in by_arm.items()}
    seed = zlib.crc32("-".join(map(str, about.values())).encode())
    return [_row(about, by_arm[arm], arm, scores, seed) for arm in sorted(by_arm, key=_order)]


def _row(
    about: dict[str, Any], rounds: Sequence[dict[str, Any]], arm: str, scores: dict[str, np.ndarray], seed: int
) -> dict[str, Any]:
    answers = [each for row in rounds for each in row["answers"]]
    row = {**about, "arm": arm, "n": len(answers), "documents": len(rounds), "accuracy": float(scores[arm].mean())}
    for other in (FULL, SEPARATE):
        if other in scores:
            found = against_full(scores[arm] - scores[other], np.random.default_rng(seed))
            row |= {f"{other}_{name}": value for name, value in found.items()}
    kept = [evidence_kept(each["sets"] or "", each["evidence"]) for each in answers]
    row["evidence_kept"] = _mean(kept)
    row["said_tokens"] = _mean([each["said_tokens"] for each in answers])
    row |= {name: _mean([each.get(name) for each in rounds]) for name in MEANS}
    row["stalls"] = sum(each["stalls"] for each in answers)
    row["shrunk"] = sum(each["shrunk"] for each in answers)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} | {
        name: rounds[-1].get(name) for name in RUN
    }


def _score(answer: dict[str, Any]) -> float:
    return METRICS[answer["metric"]](answer["answer"], answer["references"]) * 100


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _order(arm: str) -> tuple[int, str]:
    return (FULL, SEPARATE).index(arm) if arm in (FULL, SEPARATE) else 2, arm


def write(output: pathlib.Path, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``group-quality.json``, which says of every row which run it is of, and ``group-quality.md``.

    Returns:
        Rows as they are in the file.
    """
    runs, rows = by_run(found)
    parts = (
        f'"{name}": [\n' + ",\n".join(map(json.dumps, each)) + "\n]" for name, each in (("runs", runs), ("rows", rows))
    )
    (output / NAME).write_text("{\n" + ",\n".join(parts) + "\n}\n")
    (output / NAME).with_suffix(".md").write_text(markdown(found))
    return rows


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The table, and how to read it."""
    lines = [f"| {' | '.join(TITLES)} |", "| --- " * len(TITLES) + "|"]
    lines += [f"| {' | '.join(_cells_of(row))} |" for row in found]
    return "\n".join(lines) + (
        "\n\nAccuracy in points of 100, with its differences on the same questions and their 95 % intervals. *Evidence "
        "kept; read*: the share of the pages with the answer that were in a request's own sets, and that it read, with "
        "what its group read for it. *Read apart*: pages that the "
        "requests' sets have, each counted for every request that has it. *Union*: different ones of these; pages of "
        "the document count once. *Held*: what the server held for these requests, by its own count. *Attention "
        "reads*: without groups what is read apart, with groups less what was read once for several. All of steps in "
        "which every request decodes and has its first set.\n"
    )


def table(found: Sequence[dict[str, Any]]) -> Table:
    """The same, for a terminal."""
    answers = Table(*TITLES, title="many questions about one document")
    for row in found:
        answers.add_row(*_cells_of(row))
    return answers


def _cells_of(row: dict[str, Any]) -> list[str]:
    arm = row["arm"]
    in_groups = f"{row['groups']:.1f} ({row['members']:.1f})" if row["group_steps"] else ""
    return [
        f"{row['model']}; {row['indexer'] or row['policy']} {row['budget']:.1%}" + and_arguments(row, "; "),
        str(row["length"]),
        f"{row['kind']}, {row['n']} about {row['documents']}",
        arm,
        _number(row["said_tokens"]),
        f"{row['accuracy']:.1f}" + ("" if row["counted"] else " *"),
        "" if arm == FULL else _difference(row, FULL),
        "" if arm in (FULL, SEPARATE) else _difference(row, SEPARATE),
        "; ".join(_number(row[name], 100, " %") for name in ("evidence_kept", "evidence_read")),
        _number(row["set_pages"]),
        _number(row["pages"]),
        _number(row["union"]),
        _number(row["union_bytes"], 1e-6),
        _number(row["held_bytes"], 1e-6),
        _number(row["attention_reads"]),
        _number(row["exchanged"]),
        in_groups,
    ]


def _difference(row: dict[str, Any], other: str) -> str:
    if f"{other}_delta" not in row:
        return ""
    low, high = row[f"{other}_delta_ci_low"], row[f"{other}_delta_ci_high"]
    return f"{row[f'{other}_delta']:+.1f} ({low:+.1f} to {high:+.1f})"


def _number(value: float | None, times: float = 1.0, unit: str = "") -> str:
    return "" if value is None else f"{value * times:.1f}{unit}"
