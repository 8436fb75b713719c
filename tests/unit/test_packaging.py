"""The package as installed: nothing shadowed, a wheel with every module once, pins, layers, no machine paths."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement

import sglang_lsa
from sglang_lsa.patches.releases import RELEASES

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOP_LEVEL_FOLDERS = ("kernels", "patches", "radix_ext")  # imported as sglang_lsa.<name>


def repository_files() -> list[pathlib.Path]:
    """Paths relative to the root of all files that belong to the repository, committed or not; symlinks unresolved."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:  # an unpacked archive instead of a clone
        generated = {".git", ".venv", "__pycache__", "build", "dist", "demo-output", "sglang_lsa.egg-info"}
        caches = {".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
        files = []
        for folder, subfolders, names in os.walk(ROOT):
            links = [name for name in subfolders if (pathlib.Path(folder) / name).is_symlink()]
            subfolders[:] = [name for name in subfolders if name not in generated | caches]
            files += [(pathlib.Path(folder) / name).relative_to(ROOT) for name in names + links]
        return sorted(files)
    paths = [pathlib.Path(name) for name in run.stdout.split("\0") if name]
    return sorted({path for path in paths if os.path.lexists(ROOT / path)})


def package_modules() -> list[pathlib.Path]:
    """Every Python file of the package, by its real place (not through the symlinks)."""
    folders = ("sglang_lsa", *TOP_LEVEL_FOLDERS)
    return [path for path in repository_files() if path.suffix == ".py" and path.parts[0] in folders]


# --- nothing is shadowed -------------------------------------------------------------------------------------------


def test_hugging_face_kernels_is_not_shadowed() -> None:
    script = "import kernels, sglang_lsa.kernels as ours; print(kernels.__file__, *ours.__path__, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    hugging_face, *ours = run.stdout.splitlines()
    assert pathlib.Path(hugging_face).parts[-3:] == ("site-packages", "kernels", "__init__.py")
    assert [pathlib.Path(path).resolve() for path in ours] == [ROOT / "kernels"]


def test_this_process_sees_the_same_packages() -> None:
    """pytest's `--import-mode=importlib` keeps test folders off `sys.path`, but for the helpers in `tests/support`."""
    inside = {
        pathlib.Path(path).resolve() for path in sys.path if ROOT / "tests" in pathlib.Path(path).resolve().parents
    }
    assert inside == {ROOT / "tests" / "support"}
    spec = importlib.util.find_spec("kernels")
    assert spec is not None and spec.origin is not None, "the folder kernels/ won: does it hold an __init__.py?"
    assert "site-packages" in spec.origin


@pytest.mark.parametrize("name", TOP_LEVEL_FOLDERS)
def test_top_level_folder_is_no_package_and_is_linked(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists(), f"an __init__.py makes {name}/ a top-level package"
    assert os.readlink(ROOT / "sglang_lsa" / name) == f"../{name}"


# --- sdist and wheel -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A wheel built from the sdist of a copy of the repository, offline."""
    copy = tmp_path_factory.mktemp("copy")
    for path in repository_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    (wheel,) = (copy / "dist").glob("*.whl")
    return wheel


def test_wheel_holds_every_module_exactly_once(wheel: pathlib.Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    expected = [
        path.as_posix() if path.parts[0] == "sglang_lsa" else f"sglang_lsa/{path.as_posix()}"
        for path in package_modules()
    ]
    assert sorted(names) == sorted(expected)
    for folder in TOP_LEVEL_FOLDERS:
        assert any(name.startswith(f"sglang_lsa/{folder}/") for name in names), f"no module of {folder}/ in the wheel"


def test_wheel_holds_the_fingerprints(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    assert {f"sglang_lsa/patches/fingerprints/{release}.json" for release in RELEASES} <= names


def test_wheel_holds_the_shipped_indexers(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"):
        for file in ("README.md", "SHA256SUMS", "config.json", "model.safetensors"):
            assert f"sglang_lsa/indexer/shipped/{name}/{file}" in names


def test_wheel_holds_the_speeches(wheel: pathlib.Path) -> None:
    files = zipfile.ZipFile(wheel)
    speeches, note = (files.read(f"sglang_lsa/texts/data/{name}") for name in ("speeches.txt.xz", "README.md"))
    assert hashlib.sha256(speeches).hexdigest() in note.decode()


def test_wheel_installs_only_sglang_lsa(wheel: pathlib.Path) -> None:
    metadata = f"sglang_lsa-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()} == {"sglang_lsa", metadata}


def test_wheel_registers_the_plugin_and_the_command(wheel: pathlib.Path) -> None:
    entry_points = zipfile.ZipFile(wheel).read(f"sglang_lsa-{PROJECT['version']}.dist-info/entry_points.txt").decode()
    assert "[sglang.srt.plugins]\nlsa = sglang_lsa.plugin:register" in entry_points
    assert "[console_scripts]\nsglang-lsa = sglang_lsa.cli:main" in entry_points


# --- versions ------------------------------------------------------------------------------------------------------


def pinned() -> dict[str, str]:
    return dict(requirement.split("==") for requirement in PROJECT["dependencies"] if "==" in requirement)


def test_versions_agree() -> None:
    assert pinned() == {}, "SGLang says which torch and transformers it runs with"
    assert PROJECT["version"] == sglang_lsa.__version__


def test_the_releases_that_pip_may_take_are_those_in_the_table() -> None:
    (asked,) = [asked for text in PROJECT["dependencies"] if (asked := Requirement(text)).name == "sglang"]
    micros = [f"0.5.{number}" for number in range(40)]
    assert [release for release in micros if asked.specifier.contains(release)] == list(RELEASES)
    assert asked.specifier.contains(importlib.metadata.version("sglang")), "run `make setup`"


def test_python_range_is_the_same_everywhere() -> None:
    assert PROJECT["requires-python"] == ">=3.10,<3.13"
    script = (ROOT / "scripts" / "setup.sh").read_text()
    assert "(3, oldest) <= sys.version_info[:2] <= (3, 12)" in script
    assert "|| oldest=10" in script


# --- layers --------------------------------------------------------------------------------------------------------

MAY_IMPORT_SGLANG = {
    "sglang_lsa/adapt/checks.py",
    "sglang_lsa/bench/dsv4_forge.py",
    "sglang_lsa/bench/dsv4_plugin.py",
    "sglang_lsa/plugin.py",
    "sglang_lsa/attend/dsv4.py",
    "sglang_lsa/attend/torch_native.py",
    "sglang_lsa/attend/flash_attention.py",
    "sglang_lsa/attend/flashinfer.py",
    "sglang_lsa/launch_server.py",
    "sglang_lsa/stock_server.py",
    "radix_ext/allocator.py",
    "radix_ext/checkpoint_cache.py",
    "radix_ext/exact_tokens.py",
    "radix_ext/finishing_cache.py",
    "radix_ext/radix_cache.py",
    "radix_ext/swa_allocator.py",
    "radix_ext/unified_cache.py",
    "radix_ext/unified_tree.py",
}
KERNELS_MAY_IMPORT = sys.stdlib_module_names | {"torch", "triton", "numpy", "sglang_lsa.kernels"}


def imported_modules(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of all modules imported anywhere in `tree`, except for type checkers only.

    `package` is the dotted package of the module, for relative imports. `from a import b` yields `a.b`, because `b`
    may be a module. Counts `import_module("a.b")` and `__import__("a.b")` with a literal name.
    """
    if isinstance(tree, ast.If) and ast.unparse(tree.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for statement in tree.orelse:
            yield from imported_modules(statement, package)
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - tree.level + 1] if tree.level else []
        source = ".".join([*parents, tree.module] if tree.module else parents)
        yield from (f"{source}.{alias.name}" for alias in tree.names)
    elif isinstance(tree, ast.Call) and ast.unparse(tree.func).split(".")[-1] in ("import_module", "__import__"):
        yield from (str(name.value) for name in tree.args[:1] if isinstance(name, ast.Constant))
    for child in ast.iter_child_nodes(tree):
        yield from imported_modules(child, package)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer_violations(path: pathlib.Path, source: str) -> list[str]:
    """The imports of the module at `path` (relative to the root) that its layer forbids."""
    parts = path.parent.parts if path.parts[0] == "sglang_lsa" else ("sglang_lsa", *path.parent.parts)
    modules = list(imported_modules(ast.parse(source), ".".join(parts)))
    if path.parts[0] == "kernels":
        return [module for module in modules if not any(is_within(module, package) for package in KERNELS_MAY_IMPORT)]
    if path.parts[0] == "patches" or path.as_posix() in MAY_IMPORT_SGLANG:
        return []
    return [module for module in modules if is_within(module, "sglang")]


@pytest.mark.parametrize("path", package_modules(), ids=str)
def test_layers(path: pathlib.Path) -> None:
    forbidden = layer_violations(path, (ROOT / path).read_text())
    assert not forbidden, f"{path} imports {', '.join(forbidden)}: see the layers in this file"


@pytest.mark.parametrize(
    ("path", "source", "forbidden"),
    [
        ("sglang_lsa/memory/pages.py", "import sglang", ["sglang"]),
        ("sglang_lsa/memory/pages.py", "import sglang_lsa.config", []),
        ("sglang_lsa/memory/ledger.py", "def f():\n    from sglang.srt import server_args", ["sglang.srt.server_args"]),
        ("sglang_lsa/memory/ledger.py", "importlib.import_module('sglang.srt')", ["sglang.srt"]),
        (
            "sglang_lsa/memory/ledger.py",
            "if TYPE_CHECKING:\n    import sglang\nelse:\n    import sglang.srt",
            ["sglang.srt"],
        ),
        ("radix_ext/allocator.py", "import sglang", []),
        ("patches/any.py", "import sglang", []),
        ("kernels/a.py", "import triton.language\nfrom . import b\nfrom sglang_lsa.kernels.b import c", []),
        ("kernels/a.py", "from ..config import LSAConfig", ["sglang_lsa.config.LSAConfig"]),
        ("kernels/a.py", "import transformers", ["transformers"]),
    ],
)
def test_layer_rule_finds(path: str, source: str, forbidden: list[str]) -> None:
    assert layer_violations(pathlib.Path(path), source) == forbidden


# --- nothing of the machine it was written on ----------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:" + "|".join(["work", "root"]) + r")/[\w.]")


def test_no_machine_paths() -> None:
    found = []
    for path in repository_files():
        if (ROOT / path).is_file() and not (ROOT / path).is_symlink():
            text = (ROOT / path).read_bytes().decode("utf-8", errors="ignore")
            found += [f"{path}: {line.strip()[:120]}" for line in text.splitlines() if MACHINE_PATH.search(line)]
    assert not found, "paths of one machine:\n" + "\n".join(found)


def test_machine_path_pattern() -> None:
    folder = "work"
    assert MACHINE_PATH.search(f"open('/{folder}/x')")
    assert not MACHINE_PATH.search(f"https://example.org/{folder}/x")
