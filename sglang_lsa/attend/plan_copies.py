"""plan_copies: no plan of a FlashInfer wrapper is written while its last one is still to be copied to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch


class Event(Protocol):
    """As ``torch.cuda.Event``."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class PlanCopies:
    """Makes plans one after the other.

    FlashInfer writes a plan into page-locked memory that the wrapper keeps, and queues a copy of it to the device
    (``PrefillPlan`` and ``DecodePlan`` in ``flashinfer/attention/scheduler.cuh``). With SGLang's overlap scheduler the
    host plans a step as soon as the last one's predecessor is done, and nothing says that the last one's copy was made
    by then: the kernels that choose pages are before it, recalls that it waits for, and where several processes have
    the GPU by turns, all of theirs. A plan that is written meanwhile is what the last step reads by, with lengths of
    its own. It then reads less than it should, or, by kernels without tensor cores, whatever is behind its indices
    until an address is nobody's. Sets make plans differ more from step to step than growing contexts do.

    Each wrapper has its own memory: plans of others, made in the same step, need not wait for one another.

    Args:
        event: makes one for the device that plans are copied to.
    """

    def __init__(self, event: Callable[[], Event] = torch.cuda.Event):
        self._event = event
        self._copied: WeakKeyDictionary[Any, Event] = WeakKeyDictionary()

    @contextmanager
    def planning(self, *wrappers: Any) -> Iterator[None]:
        """In here, on the stream that the model runs on, these wrappers may be planned, and others may not.

        Waits, at the beginning, until their last plans were copied; they mostly were.
        """
        for wrapper in wrappers:
            if wrapper in self._copied:
                self._copied[wrapper].synchronize()
            else:
                self._copied[wrapper] = self._event()
        try:
            yield
        finally:
            for wrapper in wrappers:
                self._copied[wrapper].record()
