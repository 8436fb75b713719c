"""Fingerprints: hashes of what source says of a symbol. Two sources have one if Python reads the same in both.

Comments, docstrings and positions do not count. The syntax tree is written down here instead of by ``ast.dump``, which
differs from one Python to the next in the fields that nodes have (``type_params`` since 3.12), in empty ones that it
leaves out (3.13), in what it takes for printable, and in how it cuts the text of f-strings (3.12).
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence

IGNORED = {"kind", "type_comment", "type_ignores"}
"""Fields of nodes that say nothing of what is run: ``u`` before a string, comments for type checkers."""
DIGITS = 16
"""Of a hash, hexadecimal."""


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def fingerprint(nodes: Iterable[ast.AST]) -> str:
    """Of definitions in their order."""
    return hash_of("".join(part for node in nodes for part in (*_written(node), "\n")).encode())


def _written(node: ast.AST) -> Iterator[str]:
    """A node as text, with its fields by name; empty ones are left out, and so are strings that are statements."""
    yield f"({type(node).__name__}"
    for name, value in ast.iter_fields(node):
        if name in IGNORED or value is None or value == []:
            continue
        yield f" {name}="
        if isinstance(node, ast.Constant):
            yield ascii(value)
        elif isinstance(node, ast.JoinedStr):
            yield from _listed(_joined(node.values))
        elif isinstance(value, list):
            yield from _listed(value)
        elif isinstance(value, ast.AST):
            yield from _written(value)
        else:
            yield ascii(value)
    if isinstance(node, ast.Constant) and node.value is None:
        yield " value=None"
    yield ")"


def _listed(values: Sequence[object]) -> Iterator[str]:
    yield "["
    for value in values:
        if isinstance(value, ast.AST):
            if not _is_text(value):
                yield from _written(value)
        else:
            yield f"{value!a},"
    yield "]"


def _is_text(node: ast.AST) -> bool:
    """A docstring, of whatever it may be."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _joined(values: Sequence[ast.expr]) -> list[ast.expr]:
    """Parts of an f-string, neighbouring pieces of text in one."""
    parts: list[ast.expr] = []
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            if not value.value:
                continue
            before = parts[-1] if parts else None
            if isinstance(before, ast.Constant):
                parts[-1] = ast.Constant(str(before.value) + value.value)
                continue
        parts.append(value)
    return parts
