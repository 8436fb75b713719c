"""Finding: one thing that was looked at, and what is to be said about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, NOTE, TROUBLE, SKIPPED = "ok", "note", "trouble", "skipped"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: ``versions``, ``machine``, ``kernels``, ``hooks`` or ``server``.
        name: what was looked at.
        status: ``ok``; ``note``: good to know; ``trouble``: something will not work; ``skipped``: not looked at.
        seen: what was found.
        why: what it is needed for; what happens otherwise.
        fix: what to do about it.
    """

    section: str
    name: str
    status: str
    seen: str
    why: str = ""
    fix: str = ""


def has_trouble(findings: Iterable[Finding]) -> bool:
    return any(finding.status == TROUBLE for finding in findings)
