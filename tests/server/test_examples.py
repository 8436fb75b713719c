"""The examples run as their first lines say, against a real server."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
from prompts import needle

from sglang_lsa.server_process import ServerProcess

pytestmark = pytest.mark.server
EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def test_compare_budgets(lsa: ServerProcess, tmp_path: pathlib.Path) -> None:
    sample = needle(1600, 0.5, 12)
    text, question = sample.prompt.rsplit("\n", 1)
    document = tmp_path / "document.txt"
    document.write_text(text)
    command = [sys.executable, str(EXAMPLES / "compare_budgets.py"), "--url", lsa.url, "--document", str(document)]
    done = subprocess.run([*command, "--question", question], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    full, *others = done.stdout.splitlines()
    assert sample.answer in full
    read, of = (int(full.split(" pages")[0].split()[i]) for i in (-3, -1))
    assert read == of
    assert len(others) == 4
    for line in others:
        assert int(line.split(" pages")[0].split()[-3]) < of
