"""The README is short, its commands exist, and what it promises has a test or a result (``docs/promises.md``).

Its links are followed in ``test_links``.
"""

from __future__ import annotations

import collections
import pathlib
import re

import pytest
from figures import NUMBER, ROW, blocks, claims, looked_up, plain

from sglang_lsa.config import LSAConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = blocks(README)
CLAIMS = [(claim.quote, claim.proofs) for claim in claims() if claim.page == ROOT / "README.md"]
"""What the README says, and the tests and rows behind it."""


def blocks_of(quote: str) -> list[str]:
    return [block for block in BLOCKS if plain(quote) in plain(block)]


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
def test_what_is_promised_is_there(quote: str, proofs: tuple[str, ...]) -> None:
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
