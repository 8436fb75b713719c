"""``scripts/figures.py``: tables, numbers and pictures that are committed are what the committed results make."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

import figures
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BY_HAND = {"docs/images/memory.svg", "docs/images/window.svg", "docs/images/dsv4.png"}
"""Drawings of how it works, not of results."""
OF_RUNS = {"docs/view.png"}
"""What ``figures.py`` names as made elsewhere, beside those by depth."""


def check(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    return figures.main()


def with_result(monkeypatch: pytest.MonkeyPatch, file: str, change: dict[str, Any], **where: Any) -> None:
    """The results as they would be if the rows of ``file`` with these values had others, too."""
    content = copy.deepcopy(figures.content_of(file))
    rows = content if isinstance(content, list) else content["rows"]
    found = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
    assert found
    for row in found:
        row.update(change)
    of = figures.content_of
    monkeypatch.setattr(figures, "content_of", lambda name: content if name == file else of(name))


def test_everything_is_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(monkeypatch) == 0, capsys.readouterr()


@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)) for path in figures.pictures()])
def test_a_picture_shows_the_data_that_is_there(name: str) -> None:
    picture = figures.pictures()[ROOT / name]
    assert picture.data, "it shows nothing"
    assert figures.stamp_of(ROOT / name) == picture.stamp
    assert dataclasses.replace(picture, data=[picture.data, 1]).stamp != picture.stamp


def test_every_picture_is_made_or_named() -> None:
    there = {str(path.relative_to(ROOT)) for kind in ("png", "svg") for path in (ROOT / "docs").rglob(f"*.{kind}")}
    made = {str(path.relative_to(ROOT)) for path in figures.pictures()}
    by_depth = {name for name in there if re.match(r"docs/results/depth-", name)}
    assert there == made | by_depth | BY_HAND | OF_RUNS
    assert "depth-*.png" in str(figures.__doc__) and "view.png" in str(figures.__doc__)


def test_a_picture_that_is_drawn_has_its_stamp(tmp_path: pathlib.Path) -> None:
    picture = figures.pictures()[ROOT / "docs" / "results" / "prefill.png"]
    path = tmp_path / "picture.png"
    assert figures.stamp_of(path) is None
    figures.draw(path, picture)
    assert figures.stamp_of(path) == picture.stamp


def test_a_new_result_changes_the_page_and_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"workload": "tpot", "model": "8b", "system": "lsa", "context": 131072, "kv_dtype": "bfloat16"}
    before = figures.pages()[ROOT / "README.md"]
    with_result(monkeypatch, "serving.json", {"tpot_ms_p50": 4.321}, **where)
    after = figures.pages()
    row = next(line for line in before.splitlines() if line.startswith("| one request, ms per token at 1K / 128K"))
    assert row.replace("5.45", "4.32") in after[ROOT / "README.md"]
    assert row not in after[ROOT / "README.md"]
    assert "context=131072 batch=1 commit=6099ff7 kv_dtype=bfloat16: tpot_ms_p50 = 4.32`" in after[figures.PROMISES]
    assert check(monkeypatch) == 1


def test_a_new_result_changes_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"suite": "ruler", "task": "average", "length": 16384, "arm": "quest", "budget": 0.1}
    with_result(monkeypatch, "quality-60.json", {"accuracy": 71.25, "delta": -17.5}, **where)
    assert re.search(r"\| Quest \| 10 % \| 71\.2 .*\| -17\.5 ", figures.pages()[ROOT / "docs" / "evaluation.md"])


def test_a_table_that_was_not_there_yet_takes_no_other_text() -> None:
    marks = "<!-- scripts/figures.py writes {} -->\n\n{}<!-- to here -->\n"
    page = marks.format("one", "") + "\nwords\n\n" + marks.format("two", "| old |\n\n")
    assert [(found[2], found[3]) for found in figures.TABLE.finditer(page)] == [
        ("one", "<!-- to here -->"),
        ("two", "<!-- to here -->"),
    ]
    assert "words" in figures.TABLE.sub("", page) and "old" not in figures.TABLE.sub("", page)


@pytest.mark.parametrize("length", [4096, 16384])
def test_an_arm_that_was_not_asked_is_a_blank_cell(length: int) -> None:
    rows = figures.rows_of("quality-1.5b.json")
    some = [row for row in rows if (row["arm"], row["length"]) != ("lsa", length)]
    whole, blank = (figures.quality_larger_tables.averages(each).splitlines()[4].split("|") for each in (rows, some))
    column = 2 + list(figures.quality_tables.NAMES).index(length)
    assert [new if new != old else None for old, new in zip(whole, blank, strict=True)] == [
        " " if place == column else None for place in range(len(whole))
    ]
    with pytest.raises(ValueError, match="no row is of"):
        figures.quality_larger_tables.averages([row for row in rows if row["arm"] != "full"])


def test_a_row_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with_result(monkeypatch, "serving.json", {"commit": "0"}, commit="6099ff7", workload="iso")
    assert check(monkeypatch) == 1
    assert "0 rows of serving.json have workload=iso model=1b" in capsys.readouterr().err


def test_a_table_of_load_has_one_mix() -> None:
    rows = figures.rows_of("load.json")
    for mix in ("agents", "documents"):
        lines = figures.group_load_tables.load(rows, mix).splitlines()
        mine = [row for row in rows if row["mix"] == mix]
        assert mix in lines[0]
        assert len(lines) == len(mine) + 2
        assert {line.split(" | ")[0].strip("| ") for line in lines[2:]} == {f"{row['rate_per_s']:g}" for row in mine}
    with pytest.raises(ValueError, match="is of the mix code, only of"):
        figures.group_load_tables.load(rows, "code")


def test_two_rows_of_a_table_of_quality_are_refused() -> None:
    rows = figures.rows_of("quality-60.json")
    with pytest.raises(ValueError, match="2 rows are of"):
        figures.quality_tables.ruler_60([*rows, *rows])


@pytest.mark.parametrize(
    ("value", "like", "text"),
    [(5.876, "5.88", "5.88"), (5.874, "5.88", "5.87"), (2219.4, "356", "2,219"), (0.5, "1", "1"), (0.5, "0", "0")],
)
def test_rounding_is_that_of_the_page(value: float, like: str, text: str) -> None:
    assert figures.rounded(value, like) == text


def test_every_row_is_of_a_run() -> None:
    runs = json.loads((figures.RESULTS / "runs.json").read_text())
    assert [run["id"] for run in runs] == list(range(1, len(runs) + 1))
    for file in ("serving.json", "quality.json", "selectors.json"):
        of_file = [run for run in runs if run["file"] == file]
        assert all(run["machine"] and run["command"] and run["commit"] for run in of_file)
        content = figures.content_of(file)
        rows = content["rows"] if isinstance(content, dict) else content
        count = sum(len(row["rows"]) for row in rows) if file == "selectors.json" else len(rows)
        assert sum(run["rows"] for run in of_file) == count


def test_every_number_of_another_page_is_of_a_row() -> None:
    others = [claim for claim in figures.claims() if claim.page != ROOT / "README.md"]
    assert len(others) >= 15
    for claim in others:
        assert claim.proofs and all(figures.ROW.fullmatch(proof) for proof in claim.proofs)
        (block,) = [part for part in figures.blocks(claim.page.read_text()) if claim.quote in figures.plain(part)]
        numbers = figures.NUMBER.findall(block)
        for proof in claim.proofs:
            assert figures.ROW.fullmatch(proof)[4] in numbers, proof  # type: ignore[index]
