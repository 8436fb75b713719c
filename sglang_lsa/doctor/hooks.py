"""The hook table against the SGLang that is installed: each symbol that LSA wraps, none of them wrapped here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_lsa.doctor.findings import OK, TROUBLE, Finding

if TYPE_CHECKING:
    from sglang_lsa.patches.hook import Hook

SECTION = "hooks"


def hook_findings(hooks: Sequence[Hook] | None = None) -> list[Finding]:
    """The version of SGLang, then every hook of the table (or of ``hooks``): ok, or what is wrong, why and what to do.

    SGLang's modules are imported for it; whatever that raises is a finding.
    """
    try:
        from sglang_lsa.patches.hook import FIX, IncompatibleSGLang, check_version
        from sglang_lsa.patches.table import INTAKE, SERVING
    except Exception as error:  # a package that our own modules import is missing or broken
        why = "without it no hook can be checked or installed"
        return [Finding(SECTION, "table", TROUBLE, f"cannot be read ({error!r})", why, "see the versions above")]
    why = "the hooks were checked against that release only"
    try:
        version = importlib.metadata.version("sglang")
        check_version(version)
        found = [Finding(SECTION, "sglang", OK, version)]
    except importlib.metadata.PackageNotFoundError:
        found = [Finding(SECTION, "sglang", TROUBLE, "not installed", why, FIX)]
    except IncompatibleSGLang:
        found = [Finding(SECTION, "sglang", TROUBLE, f"is version {version}", why, FIX)]
    served = found[0].status == OK
    return found + [hook_finding(hook, served) for hook in hooks or (*INTAKE, *SERVING)]


def hook_finding(hook: Hook, served: bool = True) -> Finding:
    """One hook.

    Args:
        served: SGLang itself is there, in the release that the hooks were written for.
    """
    from sglang_lsa.patches.hook import FIX

    if served and hook.needless:
        return Finding(SECTION, hook.target, OK, f"not needed: SGLang serves without it, {hook.needs} is not installed")
    try:
        problem = hook.problem()
    except Exception as error:  # importing another release, or a broken one, can raise anything
        problem = f"cannot be looked at ({error!r})"
    if problem is None:
        return Finding(SECTION, hook.target, OK, hook.kind, hook.why)
    return Finding(SECTION, hook.target, TROUBLE, problem, hook.why, FIX)
