"""The README's tables are generated, and its commands exist; its links are followed in ``test_links``."""

from __future__ import annotations

import pathlib
import re

from sglang_lsa.config import markdown_table
from sglang_lsa.serve.metrics import markdown_table as metrics_table

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def between(mark: str) -> str:
    """What stands between ``<!-- MARK -->`` and ``<!-- /MARK -->``."""
    return README.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def test_flags_are_up_to_date() -> None:
    assert between("FLAGS") == markdown_table()


def test_metrics_are_up_to_date() -> None:
    assert between("METRICS") == metrics_table()


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z]+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"make {target}"
