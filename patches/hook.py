"""Hook: the record of one SGLang symbol that we wrap, and the check that it still is what we wrote against."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_lsa.patches.releases import IncompatibleSGLang, refusal


@dataclass(frozen=True)
class Hook:
    """One wrapped symbol.

    Attributes:
        target: dotted path, ``sglang.srt...Class.method``.
        kind: ``before``, ``after`` or ``around``, with the meaning of SGLang's ``HookType``; ``attribute`` for a value
            that SGLang only looks up there.
        function: the wrapper, called as that kind is; of an attribute, makes the new value from the old one.
        parameters: names of the target's parameters that the wrapper relies on.
        why: what would be missing without it.
        until: what would make it unnecessary.
        test: the test that fails without it.
        needs: package without which SGLang itself serves without what is wrapped, "" for none; then this hook is left
            out, too.
        relies_on: what else of SGLang the wrapper calls, or whose inner working it counts on; has a fingerprint, like
            the target (see :mod:`sglang_lsa.patches.relied`).
    """

    target: str
    kind: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    why: str
    until: str
    test: str
    needs: str = ""
    relies_on: tuple[str, ...] = ()

    @property
    def needless(self) -> bool:
        """Whether SGLang serves without what is wrapped here, because a package that it can do without is missing."""
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None

    def problem(self) -> str | None:
        """Why the target cannot be wrapped: it is not there, or takes other parameters than we rely on; else None."""
        try:
            symbol = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError) as error:
            return f"not found ({error})"
        parameters = inspect.signature(symbol).parameters
        missing = [name for name in self.parameters if name not in parameters]
        return f"takes ({', '.join(parameters)}), not {missing[0]!r}" if missing else None

    def check(self) -> None:
        """Raise IncompatibleSGLang unless the target exists and takes the parameters that we rely on."""
        if (problem := self.problem()) is not None:
            raise IncompatibleSGLang(refusal(self.target, problem))
