"""Which files have nothing to test in the SGLang that is installed."""

from __future__ import annotations

import importlib.metadata
import pathlib
from collections.abc import Iterable

import pytest

from sglang_lsa.patches.releases import DEFAULT, RELEASES

OF_DEEPSEEK_V4 = (
    "bench_dsv4",
    "bench_dsv4_arms",
    "bench_dsv4_forge",
    "compact_table",
    "dsv4",
    "dsv4_attention",
    "dsv4_paged",
    "dsv4_reference",
    "swa_checkpoints",
    "unified_cache",
)
"""Files that are about that model alone, whose windows need SGLang's unified tree."""


class Skipped(pytest.Module):
    """A file that is not imported: what it imports is not there."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip(f"DeepSeek-V4 is refused with this SGLang; run it with {DEFAULT}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: pathlib.Path, parent: pytest.Collector) -> pytest.Module | None:
    if module_path.stem.removeprefix("test_") in OF_DEEPSEEK_V4 and not has_deepseek_v4():
        return Skipped.from_parent(parent, path=module_path)
    return None


def has_deepseek_v4() -> bool:
    """Whether it can be served here; also where no SGLang is installed, which those files tell themselves."""
    try:
        return RELEASES[importlib.metadata.version("sglang")].deepseek_v4
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return True
