"""What a metric is: a name, what it means, and what it is read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sglang_lsa.serve.read_together import Figures

if TYPE_CHECKING:
    from sglang_lsa.engine.counts import Counts
    from sglang_lsa.engine.runtime import LSARuntime
    from sglang_lsa.memory.ledger import Ledger
    from sglang_lsa.memory.pager import Pager


class Now(NamedTuple):
    """What metrics are read from.

    Attributes:
        sizes: of the running requests: pages, and pages that decode reads.
        groups: of requests that read pages together; zeros where none are formed.
    """

    runtime: LSARuntime
    pager: Pager
    ledger: Ledger
    counts: Counts
    sizes: Sequence[tuple[int, int]]
    groups: Figures

    @classmethod
    def of(cls, runtime: LSARuntime) -> Now:
        sizes = [request.sizes() for request in runtime.requests.values()]
        groups = Figures.of(runtime)
        return cls(runtime, runtime.pager, runtime.pager.ledger, runtime.lookahead.counts, sizes, groups)


@dataclass(frozen=True)
class Metric:
    """One metric, and one line of the table in ``docs/metrics.md``.

    Attributes:
        name: without prefix, and without the ``_total`` of a counter.
        unit: of its value.
        text: what it means.
        read: its value; of a counter the total since the start.
    """

    name: str
    unit: str
    text: str
    read: Callable[[Now], float]


class Gauge(Metric):
    """Goes up and down."""

    kind, suffix = "gauge", ""


class Counter(Metric):
    """Only grows."""

    kind, suffix = "counter", "_total"
