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
    """The version of SGLang, then every hook of the table (or of ``hooks``): ok, or what is wrong, why and what to do;
    and what else is not the source that it should be.

    SGLang's modules are imported for it; whatever that raises is a finding.
    """
    try:
        from sglang_lsa.patches.releases import RELEASES, IncompatibleSGLang, check_version, fix
        from sglang_lsa.patches.table import INTAKE, SERVING
    except Exception as error:  # a package that our own modules import is missing or broken
        why = "without it no hook can be checked or installed"
        return [Finding(SECTION, "table", TROUBLE, f"cannot be read ({error!r})", why, "see the versions above")]
    why = "the hooks were checked against these releases only"
    try:
        version = importlib.metadata.version("sglang")
        check_version(version)
        found = [Finding(SECTION, "sglang", OK, version)]
    except importlib.metadata.PackageNotFoundError:
        found = [Finding(SECTION, "sglang", TROUBLE, "not installed", why, fix())]
    except IncompatibleSGLang:
        found = [Finding(SECTION, "sglang", TROUBLE, f"is version {version}", why, fix(version))]
    served = found[0].status == OK
    looked_at = list(hooks or (*INTAKE, *SERVING))
    if served:
        looked_at = [hook for hook in looked_at if RELEASES[version].has(hook.target)]
    found += [hook_finding(hook, served) for hook in looked_at]
    if not served:
        return found
    source = source_findings(version, [hook for hook in looked_at if not hook.needless])
    told = {finding.name for finding in source}
    return [finding for finding in found if finding.name not in told or finding.status == TROUBLE] + source


def source_findings(release: str, hooks: Sequence[Hook]) -> list[Finding]:
    """What these hooks and our subclasses rely on in SGLang, where its source is not that of ``release``."""
    from sglang_lsa.patches.reads import READS
    from sglang_lsa.patches.releases import RELEASES
    from sglang_lsa.patches.relied import BEYOND_HOOKS, Fingerprints, changed, reinstall, symbols_of
    from sglang_lsa.patches.source import Source

    symbols = [*symbols_of(hooks), *BEYOND_HOOKS]
    known = RELEASES[release]
    found = changed(Source.installed(), Fingerprints.load(release), known.symbols(symbols), known.reads(READS))
    why = f"the installed SGLang calls itself {release}, but is not what was released"
    return [Finding(SECTION, symbol, TROUBLE, what, why, reinstall(release)) for symbol, what in found.items()]


def hook_finding(hook: Hook, served: bool = True) -> Finding:
    """One hook.

    Args:
        served: SGLang itself is there, in the release that the hooks were written for.
    """
    from sglang_lsa.patches.releases import fix

    if served and hook.needless:
        return Finding(SECTION, hook.target, OK, f"not needed: SGLang serves without it, {hook.needs} is not installed")
    try:
        problem = hook.problem()
    except Exception as error:  # importing another release, or a broken one, can raise anything
        problem = f"cannot be looked at ({error!r})"
    if problem is None:
        return Finding(SECTION, hook.target, OK, hook.kind, hook.why)
    return Finding(SECTION, hook.target, TROUBLE, problem, hook.why, fix())
