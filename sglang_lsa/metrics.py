"""Prometheus metrics of one scheduler process, beside SGLang's own on ``/metrics`` (``--enable-metrics``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_lsa.runtime import LSARuntime

GAUGES: dict[str, str] = {
    "lsa_device_pages": "Pages of KV that the device pool holds at most",
    "lsa_device_pages_held": "Device pages that some request needs, shared ones counted once",
    "lsa_device_pages_cached": "Device pages with content that nobody needs now",
    "lsa_host_pages": "Pages with a copy in the host mirror",
    "lsa_host_bytes": "Bytes of those copies",
    "lsa_context_pages": "Pages of all running requests, shared ones counted for each",
    "lsa_promised_pages": "Device pages kept for prompts that are being prefilled",
    "lsa_staging_bytes": "Device bytes through which prompts read pages from the host",
    "lsa_resident_pages": "Pages that the running requests read in decode, shared ones counted for each",
    "lsa_coverage": "Share of attention that the resident sets of the running requests are expected to cover, by the "
    "indexer's estimate, the least of any request; 1 when there is no estimate",
}
COUNTERS: dict[str, str] = {
    "lsa_recalled_pages": "Pages copied from host to device",
    "lsa_recalled_bytes": "Bytes copied from host to device",
    "lsa_prefetched_pages": "Of these, pages recalled for a coming window",
    "lsa_late_pages": "Of these, pages that were not there when their window began",
    "lsa_stored_pages": "Pages copied from device to host",
    "lsa_evicted_pages": "Device pages given up for others",
    "lsa_refreshes": "Resident sets predicted",
    "lsa_stalls": "Resident sets that could not be brought in; the old ones stayed",
    "lsa_fallbacks": "Predictions that failed; the most recent pages stayed",
    "lsa_widened_sets": "Resident sets made larger than their budget because they were expected to cover too little",
    "lsa_collapsed_sets": "Resident sets of first and last pages only, because no other page seemed worth keeping",
    "lsa_warmed_pages": "Pages recalled because past requests over the same prefix selected them",
    "lsa_streamed_passes": "Prefill passes that read pages from the host",
    "lsa_streamed_pages": "Pages that they read so",
    "lsa_resident_prompts": "Prompts that read only a resident set of their cached prefix",
    "lsa_admission_waits": "Scheduling passes in which a prompt waited for device pages",
    "lsa_shrunk_sets": "Resident sets made smaller than their budget because the device pool was full",
    "lsa_retractions": "Times SGLang was asked to retract a request because the device pool was full",
    "lsa_host_evicted_pages": "Pages that left the radix tree because host memory was full",
    "lsa_refresh_failures": "Refreshes that ended with an exception; the resident set before them stayed",
    "lsa_failed_batches": "Batches whose requests were failed because memory ran out while they were computed",
    "lsa_prefix_hit_tokens": "Prompt tokens found in the radix tree",
}
PREFIX = "sglang:"


class Metrics:
    """Gauges and counters; created in the scheduler process, after SGLang chose Prometheus' multiprocess folder.

    Args:
        labels: put on every metric.
    """

    def __init__(self, labels: dict[str, str]):
        from prometheus_client import Counter, Gauge

        names = list(labels)
        self.gauges = {
            name: Gauge(PREFIX + name, text, names, multiprocess_mode="mostrecent").labels(**labels)
            for name, text in GAUGES.items()
        }
        self.counters = {name: Counter(PREFIX + name, text, names).labels(**labels) for name, text in COUNTERS.items()}
        self.counted: dict[str, int] = dict.fromkeys(COUNTERS, 0)

    def update(self, runtime: LSARuntime) -> None:
        """Bring every metric up to date with ``runtime``."""
        values = measure(runtime)
        for name, gauge in self.gauges.items():
            gauge.set(values[name])
        for name, counter in self.counters.items():
            counter.inc(values[name] - self.counted[name])
            self.counted[name] = values[name]


def measure(runtime: LSARuntime) -> dict[str, Any]:
    """Values of all metrics now; counters as totals since the start."""
    pager, ledger, lookahead = runtime.pager, runtime.pager.ledger, runtime.lookahead
    sizes = [request.residency() for request in runtime.requests.values()]
    return {
        "lsa_device_pages": ledger.physical_pages,
        "lsa_device_pages_held": ledger.held_pages,
        "lsa_device_pages_cached": ledger.device_pages - ledger.held_pages,
        "lsa_host_pages": ledger.host_pages,
        "lsa_host_bytes": ledger.host_pages * pager.page_bytes,
        "lsa_context_pages": sum(context for context, _ in sizes),
        "lsa_coverage": min((told for r in runtime.requests.values() if (told := r.coverage) is not None), default=1.0),
        "lsa_resident_pages": sum(resident for _, resident in sizes),
        "lsa_recalled_pages": ledger.recalls,
        "lsa_recalled_bytes": ledger.recalls * pager.page_bytes,
        "lsa_prefetched_pages": pager.prefetched_pages,
        "lsa_late_pages": pager.late_pages,
        "lsa_stored_pages": pager.stored_pages,
        "lsa_evicted_pages": ledger.evictions,
        "lsa_refreshes": lookahead.refreshes,
        "lsa_stalls": lookahead.stalls,
        "lsa_fallbacks": lookahead.fallbacks,
        "lsa_widened_sets": lookahead.widened,
        "lsa_collapsed_sets": lookahead.collapsed,
        "lsa_promised_pages": sum(pager.reserved.values()),
        "lsa_staging_bytes": runtime.staging_bytes,
        "lsa_warmed_pages": pager.warmed_pages,
        "lsa_streamed_passes": runtime.prefill.streamed_passes,
        "lsa_streamed_pages": runtime.staging.staged_pages,
        "lsa_resident_prompts": runtime.prefill.resident_prompts,
        "lsa_admission_waits": runtime.admission.waits,
        "lsa_shrunk_sets": lookahead.shrunk,
        "lsa_retractions": runtime.admission.pressed,
        "lsa_host_evicted_pages": runtime.host_evicted_pages,
        "lsa_refresh_failures": lookahead.failures,
        "lsa_failed_batches": runtime.failed_batches,
        "lsa_prefix_hit_tokens": runtime.prefill.radix_hit_tokens,
    }


def markdown_table() -> str:
    """The table of metrics in the README."""
    lines = ["| metric | type | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{PREFIX}{name}` | gauge | {text} |" for name, text in GAUGES.items()]
    lines += [f"| `{PREFIX}{name}_total` | counter | {text} |" for name, text in COUNTERS.items()]
    return "\n".join(lines)
