"""What of SGLang's source we rely on: found without importing it, told apart by what Python reads, refused by name."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping

import pytest
from release import HERE, READS, RELEASE, SYMBOLS

from sglang_lsa.doctor.findings import OK, TROUBLE
from sglang_lsa.doctor.hooks import hook_findings
from sglang_lsa.patches import releases, relied, table
from sglang_lsa.patches.fingerprint import fingerprint
from sglang_lsa.patches.reads import together
from sglang_lsa.patches.releases import NEWEST, RELEASES, IncompatibleSGLang, check_version
from sglang_lsa.patches.relied import FOLDER, Fingerprints, changed
from sglang_lsa.patches.source import Source, fingerprints, is_unchanged, missing_attributes
from sglang_lsa.patches.table import SERVING

pytestmark = pytest.mark.release

ROOT = pathlib.Path(__file__).resolve().parents[2]


def source(files: Mapping[str, str]) -> Source:
    return Source({path: text.encode() for path, text in files.items()}.get)


# --- releases --------------------------------------------------------------------------------------------------------


def test_releases_are_let_in_and_others_are_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    for release in RELEASES:
        check_version(release)
    monkeypatch.setitem(releases.RELEASES, "0.9.1", RELEASES[NEWEST])
    check_version("0.9.1")
    with pytest.raises(
        IncompatibleSGLang, match=r"is version 0\.9\.0; .* SGLang 0\.5\.17 or 0\.5\.23 or 0\.9\.1\. Install"
    ):
        check_version("0.9.0")


@pytest.mark.parametrize(
    ("installed", "nearest"),
    [("0.5.16", "0.5.17"), ("0.5.19", "0.5.17"), ("0.5.20", "0.5.23"), ("0.5.24.post1", "0.5.23"), ("mine", "0.5.17")],
)
def test_the_nearest_release_is_named(installed: str, nearest: str) -> None:
    with pytest.raises(
        IncompatibleSGLang, match=rf"0\.5\.17 or 0\.5\.23\. .*pip install sglang=={re.escape(nearest)}\)"
    ):
        check_version(installed)


def test_every_release_has_fingerprints() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(RELEASES)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def of(text: str) -> str:
    return fingerprint(ast.parse(text).body)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("def f(a):\n    return a", "def f(a):\n    'Says.'\n\n    # why\n    return (a)", id="comments"),
        pytest.param("class A:\n    b = 1", "class A:\n    b = 1\n    '''Of it.'''", id="documented attribute"),
        pytest.param("a = u'x'", 'a = "x"', id="quotes"),
        pytest.param("f'a' 'b' f'{c}d' ''", "f'ab{c}d'", id="pieces of an f-string"),
        pytest.param("def f(): 'a'", "def f(): 'b'", id="nothing but words"),
    ],
)
def test_what_does_not_count(one: str, other: str) -> None:
    assert of(one) == of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(a): return a", "def f(b): return b"),
        ("def f(a): pass", "async def f(a): pass"),
        ("def f(a, *, b): pass", "def f(a, b): pass"),
        ("def f(*, a, b=None): pass", "def f(*, a=None, b): pass"),
        ("@a\ndef f(): pass", "def f(): pass"),
        ("a = 1", "a = 1.0"),
        ("a = None", "a = ..."),
        ("a = 'é'", "a = 'è'"),
        ("return_ = {**a, b: c}", "return_ = {b: c, **a}"),
        ("a = b'x'", "a = 'x'"),
        ("a[1:]", "a[:1]"),
        ("f'{a!r}'", "f'{a!s}'"),
        ("f'{a:>3}'", "f'{a:>4}'"),
        ("x = f('a')", "x = f('b')"),
        ("global a, b", "global b, a"),
        ("class A(B): pass", "class A(C): pass"),
    ],
)
def test_what_counts(one: str, other: str) -> None:
    assert of(one) != of(other)


def test_a_fingerprint_is_the_same_in_every_python() -> None:
    """Values that Python 3.10, 3.11 and 3.12 must all give; none of these nodes may show what only some have."""
    text = (
        "@d\nasync def f(a: int, /, *b, c=None, **e) -> 'x':\n    return [f'{a:>{b}}é' async for a in b if not -1j]\n"
    )
    assert of(text) == "ab5b8756f7d17326"


# --- where symbols are -----------------------------------------------------------------------------------------------

FILES = {
    "p/__init__.py": "from .inner import moved as renamed\nfrom p.star import *\n",
    "p/inner.py": "def moved(): return 1\n",
    "p/star.py": "import os\nif os.name:\n    def starred(): pass\nelse:\n    def starred(): return 2\n",
    "p/base.py": """
        class Base:
            kind = 1
            def __init__(self):
                self.a, self.b = 1, 2
                self.prepare()
            def prepare(self):
                self.late: int = 3
            def never(self):
                self.c = 1
            def method(self): pass
        """.replace("\n        ", "\n"),
    "p/classes.py": """
        from p import base
        from dataclasses import dataclass
        class Derived(base.Base):
            @property
            def seen(self): return 1
        @dataclass
        class Data:
            first: int
            second: int = 2
            def __post_init__(self):
                self.third = 3
        """.replace("\n        ", "\n"),
    "p/circle.py": "from p.other import x\n",
    "p/other.py": "from p.circle import x\n",
}


@pytest.mark.parametrize(
    ("symbol", "path", "text"),
    [
        ("p.renamed", "p/inner.py", "def moved(): return 1\n"),
        ("p.starred", "p/star.py", "    def starred(): pass\n    def starred(): return 2\n"),
        ("p.base.Base.kind", "p/base.py", "    kind = 1\n"),
        ("p.classes.Derived.method", "p/base.py", "    def method(self): pass\n"),
        ("p.classes.Derived.seen", "p/classes.py", "    @property\n    def seen(self): return 1\n"),
        ("p.classes.Data.__init__", "p/classes.py", "    first: int\n    second: int = 2\n"),
    ],
)
def test_a_symbol_is_found(symbol: str, path: str, text: str) -> None:
    found = source(FILES).find(symbol)
    assert found is not None
    assert (found.path, found.text) == (path, text)


@pytest.mark.parametrize("symbol", ["p.gone", "p.gone.A", "p.base.Base.gone", "p.base.Gone.a", "q.a", "p.circle.x"])
def test_a_symbol_that_is_not_there(symbol: str) -> None:
    assert source(FILES).find(symbol) is None
    assert fingerprints(source(FILES), [symbol]) == {symbol: None}


def test_files_are_read_once() -> None:
    read: list[str] = []

    def reading(path: str) -> bytes | None:
        read.append(path)
        return FILES[path].encode() if path in FILES else None

    looked_at = Source(reading)
    fingerprints(looked_at, ["p.base.Base", "p.base.Base.method", "p.classes.Derived.method"])
    assert sorted(read) == sorted(set(read))
    assert sorted(looked_at.files) == ["p/base.py", "p/classes.py"] or "p/__init__.py" in looked_at.files


def test_attributes_that_are_read() -> None:
    reads = {
        "p.classes.Derived": ("a", "b", "late", "kind", "method", "seen", "c"),
        "p.classes.Data": ("first", "second", "third", "fourth"),
        "p.gone.Class": ("a",),
    }
    missing = ["p.classes.Derived.c", "p.classes.Data.fourth", "p.gone.Class.a"]
    assert missing_attributes(source(FILES), reads) == missing
    assert together({"a": ("x", "y")}, {"a": ("y", "z"), "b": ("x",)}) == {"a": ("x", "y", "z"), "b": ("x",)}


# --- the installed SGLang --------------------------------------------------------------------------------------------


def test_the_committed_fingerprints_are_those_of_the_installed_sglang() -> None:
    """Fails when a hook relies on something new: run ``python scripts/fingerprints.py``."""
    import importlib.metadata

    release = importlib.metadata.version("sglang")
    taken = Fingerprints.take(Source.installed(), SYMBOLS, READS)
    assert Fingerprints.load(release) == taken
    assert (FOLDER / f"{release}.json").read_text() == taken.text()


def test_looking_at_a_release_as_it_is_parses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("parsed")

    known = Fingerprints.load(HERE)
    monkeypatch.setattr(ast, "parse", parse)
    start = time.perf_counter()
    assert changed(Source.installed(), known, SYMBOLS, READS) == {}
    assert time.perf_counter() - start < 5  # some 10 ms where nothing else runs


def test_nothing_is_imported_for_it() -> None:
    script = (
        "import sys; from sglang_lsa.patches.source import Source; s = Source.installed();"
        "assert s.find('sglang.srt.managers.schedule_batch.Req'); assert 'sglang' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def patched(path: str, change: Callable[[str], str]) -> Source:
    """The installed SGLang with another file."""
    installed = Source.installed()

    def read(name: str) -> bytes | None:
        data = installed.read(name)
        return change(data.decode()).encode() if name == path and data is not None else data

    return Source(read)


POLICY = "sglang/srt/managers/schedule_policy.py"
PREEMPT = "sglang.srt.managers.schedule_policy.PrefillAdder.preempt_to_schedule"


def few(*symbols: str) -> Fingerprints:
    return Fingerprints.take(Source.installed(), symbols, {})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(lambda text: text, {}, id="as it is"),
        pytest.param(lambda text: "# mine\n" + text, {}, id="a comment"),
        pytest.param(
            lambda text: text.replace("self.preempt_list.", "self.other."), {PREEMPT: "has changed"}, id="body"
        ),
        pytest.param(
            lambda text: text.replace("def preempt_to_schedule", "def preempt"),
            {PREEMPT: "is not in its source"},
            id="gone",
        ),
    ],
)
def test_what_changed_is_named(change: Callable[[str], str], found: dict[str, str]) -> None:
    assert changed(patched(POLICY, change), few(PREEMPT), [PREEMPT], {}) == found


def test_a_symbol_without_a_fingerprint_is_named() -> None:
    known = few(PREEMPT)
    other = "sglang.srt.managers.schedule_policy.AddReqResult"
    assert changed(Source.installed(), known, [PREEMPT, other], {}) == {
        other: "has no fingerprint: run scripts/fingerprints.py"
    }


def test_an_attribute_that_is_no_longer_there_is_named() -> None:
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder"
    renamed = patched(POLICY, lambda text: text.replace("self.preempt_list", "self.preempted"))
    found = changed(renamed, few(PREEMPT), [], {adder: ("preempt_list", "can_run_list")})
    assert found == {f"{adder}.preempt_list": "is no attribute by its source"}


def test_a_server_on_another_source_is_refused_and_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    other = patched(POLICY, lambda text: text.replace("self.preempt_list.", "self.other."))
    monkeypatch.setattr(relied.Source, "installed", lambda: other)
    before = set(table._wrapped)
    hook = dataclasses.replace(
        next(hook for hook in SERVING if PREEMPT in hook.relies_on), target="sglang.srt.managers.schedule_policy.CLIP"
    )
    monkeypatch.setattr(type(hook), "check", lambda self: None)
    with pytest.raises(IncompatibleSGLang) as caught:
        table.install([hook])
    assert f"\n  {PREEMPT} has changed" in str(caught.value)
    assert str(caught.value).startswith(f"SGLang calls itself {HERE}, but is not what sglang-lsa was written for:")
    fix = f"(pip install --force-reinstall --no-deps sglang=={HERE}), or start without --lsa flags."
    assert str(caught.value).endswith(fix)
    assert table._wrapped == before
    (finding,) = [f for f in hook_findings([]) if f.name == PREEMPT]
    assert (finding.status, finding.seen) == (TROUBLE, "has changed")
    assert "--force-reinstall" in finding.fix


def test_the_doctor_says_nothing_of_a_source_that_is_right() -> None:
    assert [finding.status for finding in hook_findings(SERVING[:1])] == [OK, OK]


# --- all that is imported is relied on -------------------------------------------------------------------------------


def imports_of_sglang() -> dict[str, str]:
    """Names that our files import from SGLang, modules apart; and a file that does."""
    folders = [ROOT / name for name in ("patches", "radix_ext", "sglang_lsa/attend")]
    files = [path for folder in folders for path in folder.glob("*.py")]
    files += [ROOT / "sglang_lsa" / f"{name}.py" for name in ("plugin", "launch_server", "stock_server")]
    installed, found = Source.installed(), {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sglang":
                for alias in node.names:
                    path = f"{node.module}.{alias.name}".replace(".", "/")
                    if installed.read(f"{path}.py") is None and installed.read(f"{path}/__init__.py") is None:
                        found[f"{node.module}.{alias.name}"] = file.name
    return found


def test_what_is_imported_has_a_fingerprint() -> None:
    known = Fingerprints.load(HERE).symbols
    imported = {symbol: file for symbol, file in imports_of_sglang().items() if RELEASE.has(symbol)}
    seen = {fingerprints(Source.installed(), [symbol])[symbol]: file for symbol, file in imported.items()}
    missing = {symbol: file for symbol, file in seen.items() if symbol not in known.values()}
    assert not missing, {s: f for s, f in imported.items() if f in missing.values()}


def test_base_classes_have_fingerprints() -> None:
    known, stock = Fingerprints.load(HERE).symbols, "sglang.srt.layers.attention.flashinfer_backend."
    for name in ("FlashInferAttnBackend", "FlashInferIndicesUpdaterDecode", "FlashInferIndicesUpdaterPrefill"):
        assert stock + name in known
    assert "uvicorn.run" not in known


# --- the report of a port --------------------------------------------------------------------------------------------


def wheel(path: pathlib.Path, files: Mapping[str, str]) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_port_report_of_two_wheels(tmp_path: pathlib.Path) -> None:
    import runpy

    compare = runpy.run_path(str(ROOT / "scripts" / "port_report.py"))["compare"]
    old = wheel(tmp_path / "p-1.whl", FILES)
    body = FILES["p/base.py"].replace("def method(self): pass", "def method(self, more): pass")
    new = wheel(tmp_path / "p-2.whl", FILES | {"p/base.py": body, "p/inner.py": "# moved() is gone\n"})
    symbols = ["p.renamed", "p.starred", "p.classes.Derived.method"]
    report = compare(Source.wheel(old), Source.wheel(new), symbols, {"p.base.Base": ("a", "method", "gone")})
    assert report.same == ["p.starred"]
    assert report.gone == ["p.renamed"]
    assert report.unread == ["p.base.Base.gone"]
    assert report.changed["p.classes.Derived.method"].splitlines() == [
        "--- p/base.py",
        "+++ p/base.py",
        "@@ -1 +1 @@",
        "-    def method(self): pass",
        "+    def method(self, more): pass",
    ]
    *_, last = report.lines()
    assert last == "3 symbols: 1 same, 1 changed, 1 gone; 1 attributes gone"


def test_hashes_of_files() -> None:
    looked_at = source(FILES)
    looked_at.find("p.base.Base")
    assert is_unchanged(source(FILES), looked_at.files)
    assert not is_unchanged(source(FILES | {"p/base.py": FILES["p/base.py"] + "\n"}), looked_at.files)
    assert not is_unchanged(source({}), looked_at.files)
