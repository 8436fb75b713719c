"""Which command, on which machine, at which commit, made how many rows of the files of results. See figures.py."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

Run = dict[str, Any]
ABOUT = ("command", "server", "commit", "commits", "date")
MACHINE = ("hardware", "gpu", "machine")


def of(folder: pathlib.Path) -> list[Run]:
    """Every run once: its file, command, commit and machine, and how many rows it made."""
    found: dict[str, Run] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != "runs.json":
            for about, count in _runs_of(json.loads(path.read_text())):
                run = {"file": path.name, **about}
                known = found.setdefault(json.dumps(run, sort_keys=True), {**run, "rows": 0})
                known["rows"] += count
    return [{"id": number, **run} for number, run in enumerate(found.values(), 1)]


def _runs_of(content: Any) -> Iterator[tuple[Run, int]]:
    if isinstance(content, dict) and "runs" in content:
        of_run = [row["run"] for row in content["rows"]]
        yield from ((_about(run), of_run.count(run["id"])) for run in content["runs"])
    elif isinstance(content, dict):
        yield _about(content), len(content.get("rows", content.get("phases", [0])))
    else:
        yield from ((_about(row), len(row["rows"]) if isinstance(row.get("rows"), list) else 1) for row in content)


def _about(row: Run) -> Run:
    machine = next((row[key] for key in MACHINE if isinstance(row.get(key), str)), None)
    if machine is None and "cores" in row:
        machine = f"{row['cores']} CPU cores"
    return {"machine": machine, **{key: row[key] for key in ABOUT if row.get(key)}}


def table(runs: Sequence[Run]) -> str:
    """Of every file, its machines and commits."""
    lines = ["| file | machine | commits | runs | rows |", "| --- | --- | --- | --- | --- |"]
    by_file: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_file.setdefault((run["file"], run["machine"] or "not kept"), []).append(run)
    for (file, machine), members in by_file.items():
        commits = ", ".join(dict.fromkeys(_commit(run) for run in members))
        lines.append(f"| {file} | {machine} | {commits} | {len(members)} | {sum(run['rows'] for run in members)} |")
    return "\n".join(lines)


def _commit(run: Run) -> str:
    return str(run.get("commit") or ", ".join(run.get("commits", {}).values()) or "not kept")
