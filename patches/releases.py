"""The SGLang releases that hooks and subclasses were written for. Everything that is asked of a release is asked here.

A release is let in by this table together with its fingerprints (``fingerprints/<release>.json``): names and
parameters alone stay the same in releases that break us.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """What one release has under another name or in another place than the others.

    Attributes:
        sized_by: module in which SGLang looks up ``get_device_memory_capacity``, by which it chooses its defaults.
    """

    sized_by: str


RELEASES = {"0.5.17": Release(sized_by="sglang.srt.server_args")}
"""Oldest first."""
NEWEST = next(reversed(RELEASES))
"""The release that is named where somebody is told to install one."""
FIX = f"Install it (pip install sglang=={NEWEST}), or start without --lsa flags"


class IncompatibleSGLang(RuntimeError):
    """The installed SGLang is not one that the hooks were written for."""


def check_version(installed: str) -> None:
    """Raise IncompatibleSGLang unless ``installed`` is a release that the hooks were written for."""
    if installed not in RELEASES:
        raise IncompatibleSGLang(refusal("sglang", f"is version {installed}"))


def refusal(symbol: str, seen: str) -> str:
    """What is wrong with a symbol of SGLang, which releases are right, and what to do."""
    return f"{symbol} {seen}; sglang-lsa was written for SGLang {' or '.join(RELEASES)}. {FIX}."
