"""The README is short, its commands exist, and what it promises has a test or a result (``docs/promises.md``).

Its links are followed in ``test_links``.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import re
from typing import Any

import pytest

from sglang_lsa.config import LSAConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "docs" / "results"
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?!\d|[.,]\d)")
ROW = re.compile(r"([\w-]+\.json) ([^:]+): (\w+) = (\S+)")
"""File, ``key=value`` pairs that find one row, field, its value as the README prints it."""


def plain(text: str) -> str:
    """Markdown as it reads: links by their text, no emphasis, one space between words."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"\*+(?=\S)|(?<=\S)\*+", "", text).split())


def blocks(text: str) -> list[str]:
    """Paragraphs, items of lists and rows of tables, without code and headings, still in Markdown."""
    text = re.sub(r"^```.*?^```|^\|[^\n]*\n\| ---[^\n]*$", "", text, flags=re.M | re.S)
    text = re.sub(r"^(?=\* |\|)", "\n", text, flags=re.M)
    return [part.strip() for part in text.split("\n\n") if part.strip() and not part.lstrip().startswith("#")]


BLOCKS = blocks(README)
CLAIMS = [
    (cells[0], re.findall(r"`([^`]+)`", cells[1]))
    for line in (ROOT / "docs" / "promises.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| the README"))
    for cells in [line.strip("| ").split(" | ")]
]
"""What the README says, and the tests and rows behind it."""


def blocks_of(quote: str) -> list[str]:
    return [block for block in BLOCKS if plain(quote) in plain(block)]


@functools.cache
def rows_of(file: str) -> list[dict[str, Any]]:
    content = json.loads((RESULTS / file).read_text())
    return content if isinstance(content, list) else content["rows"]


def looked_up(file: str, where: str) -> list[dict[str, Any]]:
    wanted = dict(pair.split("=", 1) for pair in where.split())
    return [row for row in rows_of(file) if all(str(row.get(key)) == value for key, value in wanted.items())]


def printed(value: float, as_text: str) -> bool:
    """Whether a value, rounded to as many decimals, is this text."""
    decimals = len(as_text.partition(".")[2])
    return abs(value - float(as_text.replace(",", ""))) <= 0.5 * 10**-decimals + 1e-9


def measured(block: str) -> set[str]:
    """Numbers of a block that come from a measurement: they have decimals and are no name of something, or stand in
    a row of a table behind its first cell."""
    block = re.sub(r"`[^`]*`", "", block)
    text = re.sub(r"SGLang 0\.5\.17|arXiv \S+|Budget 1\.0|13\.5 %", "", plain(block))
    values = block.strip("| ").partition(" | ")[2] if block.startswith("| ") else ""
    return {number for number in NUMBER.findall(text) if "." in number} | set(NUMBER.findall(plain(values)))


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make ([a-z]+)", README, flags=re.M)
    assert {"demo", "test"} <= set(commands)
    for target in commands:
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"make {target}"


def test_the_budget_is_the_default() -> None:
    assert f"within a budget of {LSAConfig().budget * 100:.1f} %" in plain(README)


def test_there_are_claims() -> None:
    assert len(CLAIMS) > 30


@pytest.mark.parametrize(("quote", "proofs"), CLAIMS, ids=[quote[:60] for quote, _ in CLAIMS])
def test_what_is_promised_is_there(quote: str, proofs: list[str]) -> None:
    assert blocks_of(quote), "the README does not say that"
    assert proofs
    for proof in proofs:
        if found := re.fullmatch(r"(tests/[\w/]+\.py)::(\w+)", proof):
            assert f"\ndef {found[2]}(" in (ROOT / found[1]).read_text(), proof
            continue
        parts = ROW.fullmatch(proof)
        assert parts, f"{proof} is neither a test nor a row of a result"
        file, where, field, number = parts.groups()
        rows = looked_up(file, where)
        assert len(rows) == 1, f"{len(rows)} rows of {file} have {where}"
        assert printed(rows[0][field], number), f"{where}: {field} is {rows[0][field]}"


@pytest.mark.parametrize("block", BLOCKS, ids=[plain(block)[:60] for block in BLOCKS])
def test_what_is_promised_is_proven(block: str) -> None:
    """Every item of a list, every row of a table, and every number that was measured."""
    own = [proofs for quote, proofs in CLAIMS if block in blocks_of(quote)]
    assert own or not block.startswith(("* ", "| ")), "no line of docs/promises.md quotes this"
    known = {parts[4] for proofs in own for proof in proofs if (parts := ROW.fullmatch(proof))}
    assert measured(block) <= known, f"no row of a result has {sorted(measured(block) - known)}"


def test_no_measured_number_stands_twice() -> None:
    times = collections.Counter(number for block in BLOCKS for number in measured(block))
    assert [number for number, count in times.items() if count > 1] == []


@pytest.mark.parametrize(
    ("value", "text", "same"),
    [(5.875, "5.88", True), (2218.55, "2,219", True), (25, "25", True), (5.84, "5.88", False), (356.6, "356", False)],
)
def test_rounding(value: float, text: str, same: bool) -> None:
    assert printed(value, text) is same


def test_measured_numbers_are_told_from_names() -> None:
    assert measured("**SGLang 0.5.17** takes [5.88](a.md) ms instead of 12.26, budget 13.5 %") == {"5.88", "12.26"}
    assert measured("8 agents take 8.63.") == {"8.63"}
    assert measured("| 8 agents, tokens/s | 356 | 2,219 |") == {"356", "2,219"}
