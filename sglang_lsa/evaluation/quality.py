"""The files ``quality.json``, which says of every row which run it is of, and ``quality.md``."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from sglang_lsa.evaluation.summary import AVERAGE, RUN, write_markdown

NAME = "quality.json"


def write(output: pathlib.Path, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both files, of the rows of ``summarise``.

    Returns:
        Rows as they are in the file.
    """
    runs, rows = by_run(sorted(found, key=_order))
    lists = {"runs": runs, "rows": rows}
    parts = (f'"{name}": [\n' + ",\n".join(map(json.dumps, each)) + "\n]" for name, each in lists.items())
    (output / NAME).write_text("{\n" + ",\n".join(parts) + "\n}\n")
    write_markdown((output / NAME).with_suffix(".md"), rows)
    return rows


def by_run(found: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What rows repeat of their run, once a run: runs with an ``id``, and rows that have it as ``run`` instead."""
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = []
    for row in found:
        run = {name: row[name] for name in RUN}
        known = runs.setdefault(tuple(run.values()), {"id": len(runs) + 1, **run})
        rows.append({name: value for name, value in row.items() if name not in RUN} | {"run": known["id"]})
    return list(runs.values()), rows


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["suite"], row["task"] != AVERAGE, row["task"], row["length"]
