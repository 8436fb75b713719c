"""Pages written from the code are up to date."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys

from sglang_lsa.config import LSAConfig, RequestOptions

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text()


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
