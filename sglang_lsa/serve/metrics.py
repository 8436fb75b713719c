"""Prometheus metrics of one scheduler process, beside SGLang's own on ``/metrics`` (``--enable-metrics``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_lsa.serve.metric import Counter, Gauge, Now
from sglang_lsa.serve.metric_table import METRICS

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime
    from sglang_lsa.memory.pager import Pager


GAUGES = {metric.name: metric for metric in METRICS if isinstance(metric, Gauge)}
COUNTERS = {metric.name: metric for metric in METRICS if isinstance(metric, Counter)}
PREFIX = "sglang:"


class Metrics:
    """Gauges and counters; created in the scheduler process, after SGLang chose Prometheus' multiprocess folder.

    Args:
        labels: put on every metric.
    """

    def __init__(self, labels: dict[str, str]):
        import prometheus_client as client

        names = list(labels)
        self.gauges = {
            name: client.Gauge(PREFIX + name, metric.text, names, multiprocess_mode="mostrecent").labels(**labels)
            for name, metric in GAUGES.items()
        }
        self.counters = {
            name: client.Counter(PREFIX + name, metric.text, names).labels(**labels)
            for name, metric in COUNTERS.items()
        }
        self.shown: dict[str, float] = dict.fromkeys(COUNTERS, 0)

    def update(self, runtime: LSARuntime) -> None:
        """Bring every metric up to date with ``runtime``."""
        values = measure(runtime)
        if values == self.shown:
            return
        for name, gauge in self.gauges.items():
            gauge.set(values[name])
        for name, counter in self.counters.items():
            counter.inc(values[name] - self.shown[name])
        self.shown = values


def device_share(pager: Pager) -> float:
    """Part of the device pool that requests hold or were promised: what a prompt that comes now cannot have."""
    taken = pager.ledger.held_pages + pager.reservations.total
    return min(1.0, taken / pager.ledger.physical_pages)


def measure(runtime: LSARuntime) -> dict[str, float]:
    """Values of all metrics now; counters as totals since the start."""
    now = Now.of(runtime)
    return {metric.name: metric.read(now) for metric in METRICS}


def markdown_table() -> str:
    """The table of metrics in ``docs/metrics.md``."""
    lines = ["| metric | type | unit | meaning |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        name = PREFIX + metric.name + metric.suffix
        lines.append(f"| `{name}` | {metric.kind} | {metric.unit} | {metric.text} |")
    return "\n".join(lines)
