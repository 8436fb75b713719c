"""``--server-args`` of the benchmarks: what rows say of them, of earlier rows too, and names in pictures."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from sglang_lsa.bench.dsv4_report import DSV4
from sglang_lsa.bench.load_report import LOAD
from sglang_lsa.bench.prefill_report import PREFILL
from sglang_lsa.bench.report import SERVING, Results
from sglang_lsa.bench.server_args import log_path, told_apart

ALL = pytest.mark.parametrize("results", [SERVING, PREFILL, LOAD, DSV4], ids=lambda results: results.name)


@ALL
@pytest.mark.parametrize(
    ("command", "server_args"),
    [
        ("sglang-lsa bench load --rates 1", ""),
        (
            "sglang-lsa bench load --server-args '--tp-size 2  --log-level info' --rates 1",
            "--tp-size 2 --log-level info",
        ),
        ("sglang-lsa bench load '--server-args=--tp-size 2'", "--tp-size 2"),
        ("both servers' arguments by a script", ""),
        ("a script with --server-args", ""),
        (None, ""),
    ],
)
def test_rows_of_before_say_the_arguments_of_their_servers(
    results: Results, command: str | None, server_args: str
) -> None:
    """They named them in their command only, so that a resumed run took them for those of servers without."""
    old: dict[str, Any] = {"system": "lsa", "prefill_backend": "fa3", "pool_tokens": 64, "command": command}
    assert results.upgrade(old)["server_args"] == server_args
    assert results.upgrade(old | {"server_args": "--x"})["server_args"] == "--x"


@ALL
def test_rows_with_other_arguments_are_other_rows(results: Results) -> None:
    one = dict.fromkeys(results.key, "")
    assert results.identity(one) != results.identity(one | {"server_args": "--x"})


def test_a_picture_names_arguments_where_nothing_else_tells_rows_apart() -> None:
    rows = [{"name": name, "server_args": given} for name, given in (("a", ""), ("a", "--x"), ("b", "--x"))]
    name_of = told_apart(rows, lambda row: row["name"])
    assert [name_of(row) for row in rows] == ["a", "a\n--x", "b"]


def test_a_log_has_a_name_for_each_run_that_is_another() -> None:
    folder, names = pathlib.Path("out"), ("lsa", "8b")
    runs = [("--x",), ("--y",), ("",), ("", 2.0), ("", 0.2), ((0.2, 0.4), ""), (("agents",), "")]
    paths = [log_path(folder, names, *asked) for asked in runs]
    assert len(set(paths)) == len(runs) and paths == [log_path(folder, names, *asked) for asked in runs]
    assert all(path.parent == folder and path.name.startswith("lsa-8b-") for path in paths)
