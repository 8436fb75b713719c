"""Imports without Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """For the block, which imports SGLang: as its objects become more, they are searched for garbage again and again,
    which takes a sixth of the time and finds next to nothing. What is there at the end is never searched again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()
