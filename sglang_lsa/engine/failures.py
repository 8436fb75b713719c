"""Memory that runs out: what it looks like, and that it has run out for all ranks if it has for one."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from sglang_lsa.memory.ranks import Ranks

Result = TypeVar("Result")


class DevicePoolFull(RuntimeError):
    """A page that must be on the device cannot be; admission and retraction should have prevented that."""


class FailedOnAll(MemoryError):
    """Memory ran out on some rank, and every rank gives the pass up before it is queued."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on the device, or on the host, of which torch speaks in words only."""
    known = (torch.OutOfMemoryError, MemoryError, DevicePoolFull)
    return isinstance(error, known) or "can't allocate memory" in str(error) or "out of memory" in str(error)


def begin_together(ranks: Ranks, begin: Callable[[], Result]) -> Result:
    """What ``begin`` returns, if it returns on all ranks.

    Raises:
        FailedOnAll: memory ran out on one of several ranks.
    """
    if ranks.size == 1:
        return begin()
    result, problem = None, None
    try:
        result = begin()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        problem = error
    if ranks.any(problem is not None, "begin a prefill pass"):
        raise FailedOnAll(
            str(problem) if problem else "another rank could not begin this pass, see its log"
        ) from problem
    assert result is not None
    return result


def require_together(ranks: Ranks, error: BaseException, layer: int) -> None:
    """A pass failed: see that it did so on all ranks, and as far as can be told at the same place.

    Args:
        layer: that it had come to.

    Raises:
        RanksDisagree: it did not, and others wait within the model, or have computed what this rank has not.
    """
    if ranks.size > 1 and not isinstance(error, FailedOnAll):
        ranks.failed_together(f"{kind_and_place(error)} (layer {layer})")


def kind_and_place(error: BaseException) -> str:
    """What and where it was, without its words: those of memory that ran out name a GPU and what is free there."""
    frames = traceback.extract_tb(error.__traceback__)
    place = " > ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__} in {place}"
