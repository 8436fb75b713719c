"""Answers that were given already, in a file of JSON lines: an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any


class Store:
    """Rows by key; a row is written as soon as it is there.

    Args:
        path: created if it is missing; a last line that was cut off is dropped.

    Raises:
        ValueError: the file is something else.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().split("\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise ValueError(f"{path}, line {number}, is no answer: move the file away") from None
        if lines and lines[-1]:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def key(*parts: Any) -> str:
    """Of everything that an answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
