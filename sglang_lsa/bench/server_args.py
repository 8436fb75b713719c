"""``--server-args`` of the benchmarks: as rows say them, of rows that did not say them, and in names of logs."""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import shlex
from collections.abc import Callable, Sequence

from sglang_lsa.bench.systems import Row


def same_words(server_args: str) -> str:
    """Arguments as they stand in rows, however they were quoted and spaced.

    Raises:
        ValueError: a quotation mark has no other.
    """
    try:
        return shlex.join(shlex.split(server_args))
    except ValueError as error:
        raise ValueError(f"--server-args {server_args}: cannot be split ({error}): quote it as for a shell") from None


def with_arguments(row: Row) -> Row:
    """A row as it is written now: before rows named the arguments that all servers got, their command did."""
    if "server_args" in row:
        return row
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--server-args", nargs="?", default="", const="")
    try:
        given, _ = parser.parse_known_args(shlex.split(row.get("command") or ""))
    except ValueError:  # words of somebody, not what was typed
        return {"server_args": ""} | row
    return {"server_args": same_words(given.server_args)} | row


def and_arguments(row: Row, join: str) -> str:
    """What stands beside a system's name in tables and pictures: the arguments of its server, if it was given any."""
    return row["server_args"] and join + row["server_args"]


def told_apart(rows: Sequence[Row], name: Callable[[Row], str]) -> Callable[[Row], str]:
    """Names of rows in a picture, which has little room: with their servers' arguments only where nothing else in
    their names tells two of them apart."""
    given: dict[str, set[str]] = {}
    for row in rows:
        given.setdefault(name(row), set()).add(row["server_args"])
    return lambda row: name(row) + (and_arguments(row, "\n") if len(given[name(row)]) > 1 else "")


def log_path(folder: pathlib.Path, names: Sequence[str], *asked: object) -> pathlib.Path:
    """Where a server's log goes: the same for the same names and arguments, and another for others.

    Args:
        names: that one reads; the file begins with them.
        asked: everything else that tells one run from another, ``--server-args`` among it; too long for a file's name.
    """
    digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:8]
    return folder / f"{'-'.join((*names, digest))}.log"
