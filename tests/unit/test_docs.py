"""Pages written from the code are up to date, nothing is said twice, and every page is found from the index."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import subprocess
import sys

import figures
import pytest

from sglang_lsa.config import LSAConfig, RequestOptions
from sglang_lsa.config.kinds import CONSTANT, FLAG, KEY, REMOVED, flag_of
from sglang_lsa.serve.control import CHANGEABLE

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text()
FEATURES = [
    line.strip("| ").split(" | ")
    for part in re.split("^## ", (ROOT / "docs" / "features.md").read_text(), flags=re.MULTILINE)
    if part.startswith(("SGLang's features", "Refused at start"))
    for line in part.splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| feature |"))
]
"""Rows of the tables of features."""


def test_configuration_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_option_is_there() -> None:
    start, later = PAGE.split("## While it runs")
    keys, request = later.split("## Of a request")
    request, rest = request.split("## What is fixed")
    fixed, gone = rest.split("## Flags of earlier versions")
    for field in dataclasses.fields(LSAConfig):
        kind, row = field.metadata["kind"], f"| `{field.name}` |"
        assert [row in part for part in (start, keys, fixed)] == [kind == FLAG, kind == KEY, kind == CONSTANT]
        assert (f"| `{flag_of(field.name)}`" in start) == (kind == FLAG)
    for field in dataclasses.fields(RequestOptions):
        assert f"| `{field.name}` |" in request
    assert all(f"| `{flag_of(name)}` | {advice} |" in gone for name, advice in REMOVED.items())


def test_keys_that_a_running_server_keeps_are_named() -> None:
    head = PAGE.split("## While it runs")[1].split("| key |")[0]
    kept, changed = (re.findall("`(.*?)`", part) for part in head.split("but for")[1].split(", and ", 1))
    kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(LSAConfig)}
    assert kept == [name for name, kind in kinds.items() if kind == KEY and name not in CHANGEABLE]
    assert sorted(changed) == sorted(name for name in CHANGEABLE if kinds[name] == FLAG)


def test_features_are_listed() -> None:
    assert len(FEATURES) > 30
    assert {len(row) for row in FEATURES} == {4}


@pytest.mark.parametrize("row", FEATURES, ids=[row[0] for row in FEATURES])
def test_every_feature_names_tests_that_exist(row: list[str]) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[3])
    assert named
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
GENERATED = tuple(f"{name}.md" for name in figures.QUALITY)
"""Tables of one suite after the other."""


def passages(text: str) -> list[str]:
    """Sentences of paragraphs and items of lists, rows of tables and blocks of code, as they read."""
    text = re.sub(r"^(?=\* |- |\d+\. |\|)", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return [sentence for part in text.split("\n\n") for sentence in re.split(r"(?<=\.) ", " ".join(part.split()))]


def repeated(pages: dict[str, str], least: int = 120) -> dict[str, list[str]]:
    """Passages of ``least`` characters and more that stand twice, with the pages that have them."""
    found = collections.defaultdict(list)
    for name, text in pages.items():
        for passage in passages(text):
            if len(passage) >= least:
                found[passage].append(name)
    return {passage: names for passage, names in found.items() if len(names) > 1}


def test_nothing_is_said_twice() -> None:
    pages = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES if path.name not in GENERATED}
    assert not repeated(pages)


def in_a_row(pages: dict[str, str], words: int = 12) -> dict[str, list[str]]:
    """Runs of so many words that stand in two sentences, whatever is around them; tables and code repeat words."""
    found = collections.defaultdict(set)
    for name, text in pages.items():
        prose = re.sub(r"^```.*?^```|^\|[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
        for number, passage in enumerate(passages(prose)):
            told = re.findall(r"[\w.%-]+", passage.lower())
            for start in range(len(told) - words + 1):
                found[" ".join(told[start : start + words])].add((name, number))
    return {run: sorted(name for name, _ in places) for run, places in found.items() if len(places) > 1}


def test_no_twelve_words_in_a_row_stand_twice() -> None:
    pages = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES if path.name not in GENERATED}
    assert not in_a_row(pages)


def test_words_in_a_row_are_seen() -> None:
    said = "while a window goes on its set of pages is what every step reads"
    assert not in_a_row({"a": f"First, {said}.", "b": f"| {said} |\n\n```\n{said}\n```"})
    assert set(map(tuple, in_a_row({"a": f"First, {said}.", "b": f"So {said}, too."}).values())) == {("a", "b")}
    assert in_a_row({"a": f"{said}. And {said} again."})


def test_what_is_said_twice_is_seen() -> None:
    said = "Decode reads the [resident set](a.md) of a request, " * 5
    assert not repeated({"a": f"# One\n\n{said}\n\nelse", "b": f"* {said}"})
    assert list(repeated({"a": f"{said}\n\nelse", "b": said.replace("(a.md)", "(b.md)")}).values()) == [["a", "b"]]
    assert list(repeated({"a": f"First. {said}. More.", "b": f"Else. {said}."}).values()) == [["a", "b"]]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


def test_files_of_the_page_for_contributors_exist() -> None:
    named = re.findall(r"`([\w/.]+\.(?:py|md|toml|json))`", (ROOT / "docs" / "contributing.md").read_text())
    places = (ROOT, ROOT / "sglang_lsa", ROOT / "sglang_lsa/engine", ROOT / "sglang_lsa/memory/layout")
    named = [name for name in named if "NEW" not in name]
    assert len(named) > 30
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
