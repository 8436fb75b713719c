"""Pages written from the code are up to date."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from sglang_lsa.config import LSAConfig, RequestOptions

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
    server, request = PAGE.split("## Of a request")
    for field in dataclasses.fields(LSAConfig):
        assert f"| `--lsa-{field.name.replace('_', '-')}`" in server and f"| `{field.name}` |" in server
    for field in dataclasses.fields(RequestOptions):
        assert f"| `{field.name}` |" in request


def test_features_are_listed() -> None:
    assert len(FEATURES) > 30
    assert {len(row) for row in FEATURES} == {4}


@pytest.mark.parametrize("row", FEATURES, ids=[row[0] for row in FEATURES])
def test_every_feature_names_tests_that_exist(row: list[str]) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[3])
    assert named
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
