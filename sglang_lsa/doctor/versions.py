"""Versions: Python and the packages, against what the installed package asks for. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import platform

from sglang_lsa import __version__
from sglang_lsa.doctor.findings import NOTE, OK, TROUBLE, Finding
from sglang_lsa.patches.releases import nearest

PACKAGE = "sglang-lsa"
SECTION = "versions"
ALWAYS_TOLD = ("sglang", "torch", "transformers", "triton", "flashinfer-python", "sentence-transformers")
"""Others are told only when something is wrong with them."""
EXTRAS = {
    "gpu": "serving on a GPU",
    "train": "sglang-lsa train and recall",
}
"""Extras of the package that are looked at, and what they are for."""
PLUGIN = ("sglang.srt.plugins", "lsa")


def version_findings(on_gpu: bool) -> list[Finding]:
    """Python, this package, its plugin, and every package that it asks for.

    Args:
        on_gpu: the server would run on a GPU, so that what only a GPU needs must be right.
    """
    found = [_python()]
    try:
        installed, requirements = importlib.metadata.version(PACKAGE), importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        why = "SGLang finds the plugin by it, in every process of a server"
        found.append(Finding(SECTION, PACKAGE, TROUBLE, f"{__version__}, not installed", why, "pip install sglang-lsa"))
        return [*found, package_finding(f"sglang=={nearest(_installed_sglang())}", on_gpu)]
    right = installed == __version__
    found.append(
        Finding(
            SECTION,
            PACKAGE,
            OK if right else TROUBLE,
            __version__ if right else f"{__version__}, but installed is {installed}",
            "" if right else "what is installed may ask for other versions, and be found by SGLang instead",
            "" if right else "pip install the package again",
        )
    )
    told = [package_finding(requirement, on_gpu) for requirement in requirements if _is_looked_at(requirement)]
    found += sorted((f for f in told if f.name in ALWAYS_TOLD), key=lambda f: ALWAYS_TOLD.index(f.name))
    found += [f for f in told if f.name not in ALWAYS_TOLD and f.status == TROUBLE]
    return [*found, _plugin()]


def package_finding(asked: str, on_gpu: bool) -> Finding:
    """One package against what is asked of it, ``name>=1; extra == "gpu"``."""
    from packaging.requirements import Requirement

    requirement = Requirement(asked)
    extra = _extra(asked)
    needed = extra is None or (extra == "gpu" and on_gpu) or requirement.name == "triton"  # kernels import it
    why = f"asked for is {requirement.specifier or 'any version'}" + (f", for {EXTRAS[extra]}" if extra else "")
    install = (
        f"pip install '{PACKAGE}[{extra}]'" if extra else f"pip install '{requirement.name}{requirement.specifier}'"
    )
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(SECTION, requirement.name, TROUBLE if needed else NOTE, "not installed", why, install)
    if requirement.specifier.contains(installed, prereleases=True):
        return Finding(SECTION, requirement.name, OK, installed)
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    if requirement.name == "sglang":
        fix = f"pip install 'sglang=={nearest(installed)}'"
    return Finding(SECTION, requirement.name, TROUBLE if needed else NOTE, installed, why, fix)


def _installed_sglang() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    try:
        asked = importlib.metadata.metadata(PACKAGE)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        asked = ""
    if SpecifierSet(asked).contains(version, prereleases=True):
        return Finding(SECTION, "python", OK, version)
    return Finding(SECTION, "python", TROUBLE, version, f"asked for is {asked}", "make an environment of such a Python")


def _plugin() -> Finding:
    group, name = PLUGIN
    values = [entry.value for entry in importlib.metadata.entry_points(group=group) if entry.name == name]
    if values:
        return Finding(SECTION, "plugin", OK, values[0])
    why = "the processes of a server find LSA by it; without it they would serve without LSA"
    return Finding(
        SECTION, "plugin", TROUBLE, f"no entry point {name} in {group}", why, "pip install the package again"
    )


def _is_looked_at(asked: str) -> bool:
    extra = _extra(asked)
    return extra is None or extra in EXTRAS


def _extra(asked: str) -> str | None:
    """The extra that ``asked`` belongs to."""
    from packaging.requirements import Requirement

    marker = Requirement(asked).marker
    if marker is None or marker.evaluate({"extra": ""}):
        return None
    return next((extra for extra in EXTRAS if marker.evaluate({"extra": extra})), "other")
