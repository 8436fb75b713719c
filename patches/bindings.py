"""Methods that a module has by a name of its own, once they are wrapped: looked for once, after all hooks."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced_at_the_end() -> Iterator[None]:
    """For every function that it wraps, SGLang looks through all names of all modules for it, which takes 50 ms and
    would be two seconds of every process of a server. Meanwhile it notes methods, which hardly anybody has by a name of
    his own, and they are replaced when the block ends; functions of a module are replaced at once."""
    from sglang.srt.plugins import hook_registry

    noted: list[tuple[Any, Any, Any]] = []

    def note(original: Any, wrapped: Any, source_module: Any) -> int:
        if isinstance(source_module, types.ModuleType):
            return int(propagate(original, wrapped, source_module))
        noted.append((original, wrapped, source_module))
        return 0

    propagate, hook_registry._propagate_patch = hook_registry._propagate_patch, note
    try:
        yield
    finally:
        hook_registry._propagate_patch = propagate
        replace(noted)


def replace(noted: list[tuple[Any, Any, Any]]) -> None:
    """Put what wraps a function in its place, wherever it is a name of a module.

    Args:
        noted: function, what wraps it (and may itself be wrapped by a later one), and the module or class that has it,
            which is left as it is.
    """
    by_id = {id(original): (wrapped, source) for original, wrapped, source in noted}
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType):
            continue
        try:
            names = list(vars(module).items())
        except TypeError:  # it only says that it is a module
            continue
        for name, value in names:
            seen = value
            while (found := by_id.get(id(seen))) is not None and found[1] is not module:
                seen = found[0]
            if seen is not value:
                with contextlib.suppress(AttributeError, TypeError):
                    setattr(module, name, seen)
