"""Prometheus metrics of one scheduler process, beside SGLang's own on ``/metrics`` (``--enable-metrics``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime
    from sglang_lsa.memory.pager import Pager


class Metric(NamedTuple):
    """One line of the table in the README."""

    unit: str
    text: str


GAUGES: dict[str, Metric] = {
    "lsa_device_pages": Metric("pages", "Pages of KV that the device pool holds at most"),
    "lsa_device_pages_held": Metric("pages", "Device pages that some request needs, shared ones counted once"),
    "lsa_device_pages_cached": Metric("pages", "Device pages with content that nobody needs now"),
    "lsa_virtual_pages": Metric("pages", "Pages that the host mirror has room for: the most that can be handed out"),
    "lsa_virtual_pages_allocated": Metric(
        "pages",
        "Of these, pages of running requests and of the radix tree, which gives up its own when others need them",
    ),
    "lsa_host_pages": Metric("pages", "Pages with a copy in the host mirror"),
    "lsa_host_bytes": Metric("bytes", "Bytes of those copies"),
    "lsa_host_mirror_bytes": Metric("bytes", "Bytes of the host mirror"),
    "lsa_context_pages": Metric("pages", "Pages of all running requests, shared ones counted for each"),
    "lsa_promised_pages": Metric("pages", "Device pages kept for prompts that are being prefilled"),
    "lsa_staging_bytes": Metric("bytes", "Device bytes through which prompts read pages from the host"),
    "lsa_resident_pages": Metric(
        "pages", "Pages that the running requests read in decode, shared ones counted for each"
    ),
    "lsa_resident_share": Metric(
        "share", "Part of its pages that a running request reads in decode, mean of all requests; 0 when none runs"
    ),
    "lsa_budget": Metric("share", "Budget of requests that name none"),
    "lsa_coverage": Metric(
        "share",
        "Share of attention that the resident sets of the running requests are expected to cover, by the indexer's "
        "estimate, the least of any request; 1 when there is no estimate",
    ),
    "lsa_indexer_stale": Metric("flag", "1 when the model's weights changed after its indexer was trained, else 0"),
}
COUNTERS: dict[str, Metric] = {
    "lsa_recalled_pages": Metric("pages", "Pages copied from host to device"),
    "lsa_recalled_bytes": Metric("bytes", "Bytes copied from host to device"),
    "lsa_prefetched_pages": Metric("pages", "Of these, pages recalled for a coming window"),
    "lsa_late_pages": Metric("pages", "Of these, pages that were not there when their window began"),
    "lsa_recall_seconds": Metric("seconds", "Time that copies from host to device took there; 0 on a CPU"),
    "lsa_stored_pages": Metric("pages", "Pages copied from device to host"),
    "lsa_evicted_pages": Metric("pages", "Device pages given up for others"),
    "lsa_refreshes": Metric("sets", "Resident sets predicted"),
    "lsa_refresh_host_seconds": Metric("seconds", "Time that the scheduler spent on them"),
    "lsa_refresh_device_seconds": Metric("seconds", "Time that scoring took on the device; 0 on a CPU"),
    "lsa_stalls": Metric("sets", "Resident sets that could not be brought in; the old ones stayed"),
    "lsa_fallbacks": Metric("sets", "Predictions that failed; the most recent pages stayed"),
    "lsa_widened_sets": Metric(
        "sets", "Resident sets made larger than their budget because they were expected to cover too little"
    ),
    "lsa_collapsed_sets": Metric(
        "sets", "Resident sets of first and last pages only, because no other page seemed worth keeping"
    ),
    "lsa_warmed_pages": Metric("pages", "Pages recalled because past requests over the same prefix selected them"),
    "lsa_streamed_passes": Metric("passes", "Prefill passes that read pages from the host"),
    "lsa_streamed_pages": Metric("pages", "Pages that they read so"),
    "lsa_resident_prompts": Metric("prompts", "Prompts that read only a resident set of their cached prefix"),
    "lsa_admission_waits": Metric("passes", "Scheduling passes in which a prompt waited for device pages"),
    "lsa_shrunk_sets": Metric("sets", "Resident sets made smaller than their budget because the device pool was full"),
    "lsa_retractions": Metric(
        "steps", "Decode steps for which SGLang was asked to retract a request because the device pool was full"
    ),
    "lsa_host_evicted_pages": Metric("pages", "Pages that left the radix tree because host memory was full"),
    "lsa_refresh_failures": Metric("sets", "Refreshes that ended with an exception; the set before them stayed"),
    "lsa_failed_batches": Metric(
        "batches", "Batches whose requests were failed because memory ran out while they were computed"
    ),
    "lsa_integrity_failures": Metric(
        "findings", "Times that an idle server found its own records inconsistent; always a bug, please report it"
    ),
    "lsa_graphless_steps": Metric(
        "steps", "Decode steps that read more than the CUDA graphs' buffers hold, so without one"
    ),
    "lsa_prompt_tokens": Metric("tokens", "Tokens of admitted prompts"),
    "lsa_prefix_hit_tokens": Metric("tokens", "Of these, tokens found in the radix tree"),
    "lsa_config_changes": Metric("changes", "Times that the configuration was changed since the start"),
    "lsa_weight_updates": Metric("updates", "Times that the model's weights were changed since the start"),
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
            name: Gauge(PREFIX + name, metric.text, names, multiprocess_mode="mostrecent").labels(**labels)
            for name, metric in GAUGES.items()
        }
        self.counters = {
            name: Counter(PREFIX + name, metric.text, names).labels(**labels) for name, metric in COUNTERS.items()
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
    pager, ledger, lookahead = runtime.pager, runtime.pager.ledger, runtime.lookahead
    sizes = [request.sizes() for request in runtime.requests.values()]
    shares = [resident / context for context, resident in sizes if context]
    return {
        "lsa_device_pages": ledger.physical_pages,
        "lsa_device_pages_held": ledger.held_pages,
        "lsa_device_pages_cached": ledger.device_pages - ledger.held_pages,
        "lsa_virtual_pages": ledger.virtual_pages,
        "lsa_virtual_pages_allocated": ledger.allocated_pages,
        "lsa_host_pages": ledger.host_pages,
        "lsa_host_bytes": ledger.host_pages * pager.page_bytes,
        "lsa_host_mirror_bytes": pager.mirror.nbytes,
        "lsa_context_pages": sum(context for context, _ in sizes),
        "lsa_coverage": min(
            (told for r in runtime.requests.values() if (told := r.story.coverage) is not None), default=1.0
        ),
        "lsa_resident_pages": sum(resident for _, resident in sizes),
        "lsa_resident_share": sum(shares) / max(1, len(shares)),
        "lsa_budget": runtime.config.budget,
        "lsa_indexer_stale": float(runtime.weight_updates > 0 and runtime.indexer is not None),
        "lsa_recalled_pages": ledger.recalls,
        "lsa_recalled_bytes": ledger.recalls * pager.page_bytes,
        "lsa_recall_seconds": pager.transfer.recall_seconds,
        "lsa_prefetched_pages": pager.prefetched_pages,
        "lsa_late_pages": pager.late_pages,
        "lsa_stored_pages": pager.stored_pages,
        "lsa_evicted_pages": ledger.evictions,
        "lsa_refreshes": lookahead.counts.refreshes,
        "lsa_refresh_host_seconds": lookahead.counts.host_seconds,
        "lsa_refresh_device_seconds": lookahead.counts.device_seconds,
        "lsa_stalls": lookahead.counts.stalls,
        "lsa_fallbacks": lookahead.counts.fallbacks,
        "lsa_widened_sets": lookahead.counts.widened,
        "lsa_collapsed_sets": lookahead.counts.collapsed,
        "lsa_promised_pages": pager.reservations.total,
        "lsa_staging_bytes": runtime.staging_bytes,
        "lsa_warmed_pages": pager.warmed_pages,
        "lsa_streamed_passes": runtime.prefill.streamed_passes,
        "lsa_streamed_pages": runtime.staging.staged_pages,
        "lsa_resident_prompts": runtime.prefill.resident_prompts,
        "lsa_admission_waits": runtime.admission.waits,
        "lsa_shrunk_sets": lookahead.counts.shrunk,
        "lsa_retractions": runtime.admission.pressed,
        "lsa_host_evicted_pages": runtime.host_evicted_pages,
        "lsa_refresh_failures": lookahead.counts.failures,
        "lsa_failed_batches": runtime.failed_batches,
        "lsa_integrity_failures": runtime.integrity_failures,
        "lsa_graphless_steps": runtime.graphless_steps,
        "lsa_prompt_tokens": runtime.prefill.prompt_tokens,
        "lsa_prefix_hit_tokens": runtime.prefill.radix_hit_tokens,
        "lsa_config_changes": runtime.config_changes,
        "lsa_weight_updates": runtime.weight_updates,
    }


def markdown_table() -> str:
    """The table of metrics in the README."""
    lines = ["| metric | type | unit | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{PREFIX}{name}` | gauge | {metric.unit} | {metric.text} |" for name, metric in GAUGES.items()]
    lines += [
        f"| `{PREFIX}{name}_total` | counter | {metric.unit} | {metric.text} |" for name, metric in COUNTERS.items()
    ]
    return "\n".join(lines)
