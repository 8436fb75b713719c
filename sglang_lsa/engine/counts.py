"""What happened to resident sets since the start, counted by whoever makes it happen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass
class Counts:
    """Totals of one scheduler process, for status and metrics.

    Attributes:
        refreshes: resident sets predicted.
        stalls: sets that could not be brought in, or late; the old ones stayed.
        fallbacks: predictions that failed; the most recent pages stayed.
        failures: refreshes that ended with an exception; the set before them stayed.
        shrunk: sets made smaller than their budget because the device pool was full.
        widened: sets made larger than their budget: they were expected to cover too little, or their request repeats
            its prompt.
        collapsed: sets of first and last pages only, though there was room for more.
        exchanged: pages of sets that are there because a group reads them, in place of ones that scored higher.
        host_seconds: that this process spent on refreshes.
        device_seconds: that scoring took on the device.
    """

    refreshes: int = 0
    stalls: int = 0
    fallbacks: int = 0
    failures: int = 0
    shrunk: int = 0
    widened: int = 0
    collapsed: int = 0
    exchanged: int = 0
    host_seconds: float = 0.0
    device_seconds: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The body is work on refreshes."""
        began = time.perf_counter()
        yield
        self.host_seconds += time.perf_counter() - began


@dataclass
class Decoding:
    """What decode steps of so many requests needed, looked at now and then while no prompt waited for its pages.

    Attributes:
        samples: how often.
        held_pages: device pages that were held, summed over the samples.
    """

    samples: int = 0
    held_pages: int = 0


class Metrics(Protocol):
    """What is told of a runtime while it runs (``sglang_lsa.serve.metrics``)."""

    def update(self, runtime: Any) -> None:
        """Look at the runtime's counts, which have changed."""
        ...
