"""Imports of the package go one way: no circle, also not by way of what is imported late or for type checkers."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Mapping

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "memory", "engine", "attend", "serve", "radix_ext", "patches")
"""Folders of a server; each imports those before it only,"""
BUT = {
    ("sglang_lsa.engine.runtime", "sglang_lsa.serve.control"),
    ("sglang_lsa.radix_ext.radix_cache", "sglang_lsa.patches.releases"),
    *(
        (f"sglang_lsa.radix_ext.{name}", f"sglang_lsa.patches.{of_requests}")
        for name in ("checkpoint_cache", "exact_tokens", "finishing_cache", "unified_cache")
        for of_requests in ("requests", "request_kv")
    ),
}
"""but for what a change of the configuration is, for what SGLang's requests look like, which two files know, and for
which release it is."""


def modules() -> dict[str, pathlib.Path]:
    """Dotted names of all modules, and their files."""
    files = list(ROOT.glob("sglang_lsa/**/*.py"))
    files += [file for folder in ("kernels", "patches", "radix_ext") for file in (ROOT / folder).glob("*.py")]
    found = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[0] == "sglang_lsa" else ("sglang_lsa", *parts))
        found[name.removesuffix(".__init__")] = file
    return found


def imports(source: str, known: Mapping[str, object]) -> set[str]:
    """Those of ``known`` that a module imports. The package itself is left out: everything has it."""
    named: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named += [f"{node.module}.{alias.name}" for alias in node.names]
    found = set()
    for name in named:
        while name and name not in known:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", "sglang_lsa"}


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of modules of which each imports, by way of others, each."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]
    }
    return [set(group) for group in groups]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(file.read_text(), known) - {name} for name, file in known.items()}


def test_no_circle(graph: dict[str, set[str]]) -> None:
    assert not [", ".join(sorted(circle)) for circle in circles(graph)]


def test_layers_of_a_server(graph: dict[str, set[str]]) -> None:
    folders = {name: name.split(".")[1] for name in graph if "." in name}
    layer = {name: LAYERS.index(folder) for name, folder in folders.items() if folder in LAYERS}
    found = {
        (module, imported)
        for module in layer
        for imported in graph[module] & layer.keys()
        if layer[imported] > layer[module]
    }
    assert found == BUT


def test_texts_and_configuration_need_nothing_else(graph: dict[str, set[str]]) -> None:
    for part, below in (("texts", ("texts", "config")), ("config", ("config",))):
        for module, imported in graph.items():
            if module.startswith(f"sglang_lsa.{part}"):
                assert {name.split(".")[1] for name in imported} <= set(below), module


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}, "g": set[str]()}
    assert sorted(map(sorted, circles(graph))) == [["a", "b", "c"], ["e", "f"]]
