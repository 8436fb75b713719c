"""Where symbols are defined, from source alone: installed or in a wheel. Nothing is imported and nothing is run.

Imports the standard library alone, so that it can be used where there is no SGLang.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sglang_lsa.patches.fingerprint import fingerprint, hash_of

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Found:
    """Where a symbol is defined.

    Attributes:
        path: of the file, ``sglang/srt/...``.
        nodes: its definitions; several where conditions choose between them.
        text: of these, with decorators.
    """

    path: str
    nodes: tuple[ast.AST, ...]
    text: str

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.nodes)


@dataclass
class _Module:
    name: str
    path: str
    lines: list[str]
    body: list[ast.stmt]
    """Statements of the module, and those under its conditions."""


@dataclass
class Source:
    """Python files by their path, each read and parsed once.

    Attributes:
        read: what a file holds, None where there is none.
        files: hashes of all files that were looked into.
    """

    read: Callable[[str], bytes | None]
    files: dict[str, str] = field(default_factory=dict)
    _modules: dict[str, _Module | None] = field(default_factory=dict)

    @classmethod
    def installed(cls, package: str = "sglang") -> Source:
        """The files of an installed package, which is not imported for it.

        Raises:
            ModuleNotFoundError: there is none.
        """
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"no package {package}", name=package)
        root = pathlib.Path(next(iter(spec.submodule_search_locations))).parent

        def read(path: str) -> bytes | None:
            if not path.startswith(f"{package}/") and path != f"{package}.py":
                return None  # base classes of other packages have releases of their own
            try:
                return (root / path).read_bytes()
            except OSError:
                return None

        return cls(read)

    @classmethod
    def wheel(cls, path: pathlib.Path) -> Source:
        """The files of a wheel, which is not installed for it."""
        archive = zipfile.ZipFile(path)
        names = set(archive.namelist())
        return cls(lambda name: archive.read(name) if name in names else None)

    def find(self, symbol: str) -> Found | None:
        """Look for ``package.module.Class.method``, or a class, function or variable of a module.

        Follows imports to where a name is defined, and base classes to where a method is. What a dataclass makes of its
        fields (``__init__``) is these fields.
        """
        return self._find(symbol, set())

    def attributes(self, symbol: str) -> set[str] | None:
        """What instances of a class have by its source: methods, properties, fields, class attributes, and what
        ``__init__`` assigns to ``self``, itself or in methods that it calls; those of base classes included. None where
        there is no such class."""
        found = self._place(symbol.split("."), set())
        if found is None:
            return None
        module, nodes = found
        classes = [
            one for node in nodes if isinstance(node, ast.ClassDef) for _, one in self._lineage(module, node, set())
        ]
        return _attributes(classes)

    def _find(self, symbol: str, seen: set[str]) -> Found | None:
        placed = self._place(symbol.split("."), seen)
        if placed is None:
            return None
        module, nodes = placed
        text = "".join("".join(module.lines[slice(*_extent(node))]) for node in nodes)
        return Found(module.path, tuple(nodes), text)

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            self._modules[name] = None
            base = name.replace(".", "/")
            for path in (f"{base}.py", f"{base}/__init__.py"):
                if (data := self.read(path)) is not None:
                    self.files[path] = hash_of(data)
                    text = data.decode("utf-8", errors="replace")
                    tree = ast.parse(text)
                    self._modules[name] = _Module(
                        name, path, text.splitlines(keepends=True), list(_statements(tree.body))
                    )
                    break
        return self._modules[name]

    def _place(self, names: Sequence[str], seen: set[str]) -> tuple[_Module, list[ast.stmt]] | None:
        """The module that defines a dotted name, and the statements that do."""
        if (symbol := ".".join(names)) in seen:  # imports in a circle
            return None
        seen.add(symbol)
        for end in range(len(names) - 1, 0, -1):
            module = self._module(".".join(names[:end]))
            if module is not None:
                return self._within(module, names[end:], seen)
        return None

    def _within(self, module: _Module, names: Sequence[str], seen: set[str]) -> tuple[_Module, list[ast.stmt]] | None:
        first, rest = names[0], names[1:]
        nodes = [node for node in module.body if first in _defines(node)]
        if not nodes:
            for source in _imports(module, first):
                if (found := self._place([*source, *rest], seen)) is not None:
                    return found
            return None
        if not rest:
            return module, nodes
        for node in nodes:
            if isinstance(node, ast.ClassDef) and len(rest) == 1:
                for place, one in self._lineage(module, node, set()):
                    if members := [statement for statement in _statements(one.body) if rest[0] in _defines(statement)]:
                        return place, members
                if rest[0] == "__init__":  # made of the fields
                    fields = [s for s in node.body if isinstance(s, ast.AnnAssign)]
                    return module, [*fields] if fields else [node]
        return None

    def _lineage(self, module: _Module, node: ast.ClassDef, seen: set[str]) -> Iterator[tuple[_Module, ast.ClassDef]]:
        """A class and the base classes whose source is here, as Python looks into them where none is shared."""
        yield module, node
        for base in node.bases:
            name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            key = f"{module.name}:{name}"
            if key in seen:
                continue
            seen.add(key)
            if (found := self._within(module, name.split("."), set())) is not None:
                for one in found[1]:
                    if isinstance(one, ast.ClassDef):
                        yield from self._lineage(found[0], one, seen)


def fingerprints(source: Source, symbols: Sequence[str]) -> dict[str, str | None]:
    """Of each symbol; None for one that is not there."""
    found = {symbol: source.find(symbol) for symbol in symbols}
    return {symbol: None if one is None else one.fingerprint for symbol, one in found.items()}


def missing_attributes(source: Source, reads: Mapping[str, Sequence[str]]) -> list[str]:
    """What is read of a class and is no attribute of it by its source, as ``class.attribute``.

    Args:
        reads: dotted path of a class -> names that are read of its instances; ``a|b`` for fields of several classes,
            which are put together.
    """
    missing = []
    for symbol, names in reads.items():
        first, *_ = owners = symbol.split("|")
        there = {name for owner in owners for name in source.attributes(owner) or ()}
        missing += [f"{first}.{name}" for name in names if name not in there]
    return missing


def is_unchanged(source: Source, files: Mapping[str, str]) -> bool:
    """Whether files have these hashes; parses none, so that it takes milliseconds."""
    return all((data := source.read(path)) is not None and hash_of(data) == known for path, known in files.items())


# -- syntax trees -----------------------------------------------------------------------------------------------------


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that are run when a module or a class is, those under conditions included."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, name, ()))
            for handler in getattr(statement, "handlers", ()):
                yield from _statements(handler.body)


def _defines(node: ast.stmt) -> set[str]:
    """Names that a statement of a module or a class gives a meaning; imports apart."""
    if isinstance(node, (*Function, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _imports(module: _Module, name: str) -> Iterator[list[str]]:
    """What a name of a module may be that it imports, as dotted names."""
    for node in module.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name.split(".")[0]) == name:
                    yield alias.name.split(".") if alias.asname else [name]
        elif isinstance(node, ast.ImportFrom):
            package = module.name.split(".")
            if node.level:
                up = node.level - module.path.endswith("/__init__.py")
                package = package[: len(package) - up]
            source = [*(package if node.level else ()), *(node.module.split(".") if node.module else ())]
            for alias in node.names:
                if alias.name == "*":
                    yield [*source, name]
                elif (alias.asname or alias.name) == name:
                    yield [*source, alias.name]


def _attributes(classes: Sequence[ast.ClassDef]) -> set[str]:
    """What instances have of a class and its base classes: definitions, and what is assigned while they are made."""
    statements = [statement for one in classes for statement in _statements(one.body)]
    methods = {statement.name: statement for statement in reversed(statements) if isinstance(statement, Function)}
    names = {name for statement in statements for name in _defines(statement)}
    constructors = [s for s in statements if isinstance(s, Function) and s.name in ("__init__", "__post_init__")]
    waiting, called = list(constructors), {one.name for one in constructors}
    while waiting:
        for node in ast.walk(method := waiting.pop()):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            if not method.args.args or node.value.id != method.args.args[0].arg:
                continue
            if isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif node.attr in methods and node.attr not in called:
                called.add(node.attr)
                waiting.append(methods[node.attr])
    return names


def _extent(node: ast.stmt) -> tuple[int, int]:
    """Lines of a definition, its decorators included: first, and the one after the last, from 0."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    return first - 1, node.end_lineno or node.lineno
