"""Every metric of the server, declared once: its name, what it means, and where it is counted.

Whoever makes something happen counts it, in an attribute of its own; nothing else lists these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_lsa.serve.metric import Counter, Gauge

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


def resident_share(sizes: Sequence[tuple[int, int]]) -> float:
    """Mean over requests that have a page."""
    shares = [resident / context for context, resident in sizes if context]
    return sum(shares) / max(1, len(shares))


def least_coverage(runtime: LSARuntime) -> float:
    """Of the requests of which there is an estimate."""
    told = (request.story.coverage for request in runtime.requests.values())
    return min((coverage for coverage in told if coverage is not None), default=1.0)


METRICS: tuple[Gauge | Counter, ...] = (
    Gauge(
        "lsa_device_pages",
        "pages",
        "Pages of KV that the device pool holds at most",
        lambda now: now.ledger.physical_pages,
    ),
    Gauge(
        "lsa_device_pages_held",
        "pages",
        "Device pages that some request needs, shared ones counted once",
        lambda now: now.ledger.held_pages,
    ),
    Gauge(
        "lsa_device_pages_cached",
        "pages",
        "Device pages with content that nobody needs now",
        lambda now: now.ledger.device_pages - now.ledger.held_pages,
    ),
    Gauge(
        "lsa_virtual_pages",
        "pages",
        "Pages that the host mirror has room for: the most that can be handed out",
        lambda now: now.ledger.virtual_pages,
    ),
    Gauge(
        "lsa_virtual_pages_allocated",
        "pages",
        "Of these, pages of running requests and of the radix tree, which gives up its own when others need them",
        lambda now: now.ledger.allocated_pages,
    ),
    Gauge("lsa_host_pages", "pages", "Pages with a copy in the host mirror", lambda now: now.ledger.host_pages),
    Gauge("lsa_host_bytes", "bytes", "Bytes of those copies", lambda now: now.ledger.host_pages * now.pager.page_bytes),
    Gauge("lsa_host_mirror_bytes", "bytes", "Bytes of the host mirror", lambda now: now.pager.mirror.nbytes),
    Gauge(
        "lsa_context_pages",
        "pages",
        "Pages of all running requests, shared ones counted for each",
        lambda now: sum(context for context, _ in now.sizes),
    ),
    Gauge(
        "lsa_promised_pages",
        "pages",
        "Device pages kept for prompts that are being prefilled",
        lambda now: now.pager.reservations.total,
    ),
    Gauge(
        "lsa_staging_bytes",
        "bytes",
        "Device bytes through which prompts read pages from the host",
        lambda now: now.runtime.staging_bytes,
    ),
    Gauge(
        "lsa_resident_pages",
        "pages",
        "Pages that the running requests read in decode, shared ones counted for each",
        lambda now: sum(resident for _, resident in now.sizes),
    ),
    Gauge(
        "lsa_resident_share",
        "share",
        "Part of its pages that a running request reads in decode, mean of all requests; 0 when none runs",
        lambda now: resident_share(now.sizes),
    ),
    Gauge(
        "lsa_budget",
        "share",
        "Largest share of its pages that a set of a request may have that names no budget",
        lambda now: now.runtime.config.largest_budget,
    ),
    Gauge(
        "lsa_coverage",
        "share",
        "Share of attention that the resident sets of the running requests are expected to cover, by the indexer's "
        "estimate, the least of any request; 1 when there is no estimate",
        lambda now: least_coverage(now.runtime),
    ),
    Gauge(
        "lsa_indexer_stale",
        "flag",
        "1 when the model's weights changed after its indexer was trained, else 0",
        lambda now: float(now.runtime.weight_updates > 0 and now.runtime.indexer is not None),
    ),
    Gauge(
        "lsa_ranks",
        "ranks",
        "Ranks that share the model (`--tp-size`); pages and bytes are those of each",
        lambda now: now.pager.ranks.size,
    ),
    Gauge(
        "lsa_groups",
        "groups",
        "Groups of requests that read pages of a common prefix once for all of a group, in the last decode step; 0 "
        "unless the server forms them (`groups`)",
        lambda now: now.groups.now,
    ),
    Gauge("lsa_group_requests", "requests", "Requests in these groups", lambda now: now.groups.requests),
    Gauge("lsa_group_pages", "pages", "Pages that are read once for all of a group", lambda now: now.groups.pages),
    Gauge(
        "lsa_group_chosen_pages",
        "pages",
        "The same pages, counted for each request that chose them: what is read of them without groups",
        lambda now: now.groups.chosen_pages,
    ),
    Counter("lsa_recalled_pages", "pages", "Pages copied from host to device", lambda now: now.ledger.recalls),
    Counter(
        "lsa_recalled_bytes",
        "bytes",
        "Bytes copied from host to device",
        lambda now: now.ledger.recalls * now.pager.page_bytes,
    ),
    Counter(
        "lsa_prefetched_pages",
        "pages",
        "Of these, pages recalled for a coming window",
        lambda now: now.pager.prefetched_pages,
    ),
    Counter(
        "lsa_late_pages",
        "pages",
        "Of these, pages that the device waited for when their window began",
        lambda now: now.pager.late_pages,
    ),
    Counter(
        "lsa_recall_seconds",
        "seconds",
        "Time that copies from host to device took there; 0 on a CPU",
        lambda now: now.pager.transfer.recall_seconds,
    ),
    Counter("lsa_stored_pages", "pages", "Pages copied from device to host", lambda now: now.pager.stored_pages),
    Counter("lsa_evicted_pages", "pages", "Device pages given up for others", lambda now: now.ledger.evictions),
    Counter("lsa_refreshes", "sets", "Resident sets predicted", lambda now: now.counts.refreshes),
    Counter(
        "lsa_refresh_host_seconds",
        "seconds",
        "Time that the scheduler spent on them",
        lambda now: now.counts.host_seconds,
    ),
    Counter(
        "lsa_refresh_device_seconds",
        "seconds",
        "Time that scoring took on the device; 0 on a CPU",
        lambda now: now.counts.device_seconds,
    ),
    Counter(
        "lsa_stalls",
        "sets",
        "Resident sets that could not be brought in; the old ones stayed",
        lambda now: now.counts.stalls,
    ),
    Counter(
        "lsa_fallbacks",
        "sets",
        "Predictions that failed; the most recent pages stayed",
        lambda now: now.counts.fallbacks,
    ),
    Counter(
        "lsa_rank_checks",
        "checks",
        "Times that the records of all ranks were compared and found equal (`--lsa-debug`)",
        lambda now: now.pager.ranks.checks,
    ),
    Counter(
        "lsa_widened_sets",
        "sets",
        "Resident sets made larger than their budget because they were expected to cover too little, or because their "
        "request repeats its prompt",
        lambda now: now.counts.widened,
    ),
    Counter(
        "lsa_collapsed_sets",
        "sets",
        "Resident sets of first and last pages only, because no other page seemed worth keeping",
        lambda now: now.counts.collapsed,
    ),
    Counter(
        "lsa_warmed_pages",
        "pages",
        "Pages recalled because past requests over the same prefix selected them",
        lambda now: now.pager.warmed_pages,
    ),
    Counter(
        "lsa_streamed_passes",
        "passes",
        "Prefill passes that read pages from the host",
        lambda now: now.runtime.prefill.streamed_passes,
    ),
    Counter(
        "lsa_streamed_pages",
        "pages",
        "Pages that they read so",
        lambda now: now.runtime.staging.staged_pages if now.runtime.staging is not None else 0,
    ),
    Counter(
        "lsa_resident_prompts",
        "prompts",
        "Prompts that read only a resident set of their cached prefix",
        lambda now: now.runtime.prefill.resident_prompts,
    ),
    Counter(
        "lsa_admission_waits",
        "passes",
        "Scheduling passes in which a prompt waited for device pages",
        lambda now: now.runtime.admission.waits,
    ),
    Counter(
        "lsa_paced_passes",
        "passes",
        "Scheduling passes in which prompts waited for decode steps (`prefill_tokens_per_step`)",
        lambda now: now.runtime.pace.waits,
    ),
    Counter(
        "lsa_shrunk_sets",
        "sets",
        "Resident sets made smaller than their budget because the device pool was full",
        lambda now: now.counts.shrunk,
    ),
    Counter(
        "lsa_retractions",
        "steps",
        "Decode steps for which SGLang was asked to retract a request because the device pool was full",
        lambda now: now.runtime.admission.pressed,
    ),
    Counter(
        "lsa_host_evicted_pages",
        "pages",
        "Pages that left the radix tree because host memory was full",
        lambda now: now.runtime.host_evicted_pages,
    ),
    Counter(
        "lsa_refresh_failures",
        "sets",
        "Refreshes that ended with an exception; the set before them stayed",
        lambda now: now.counts.failures,
    ),
    Counter(
        "lsa_failed_batches",
        "batches",
        "Batches whose requests were failed because memory ran out while they were computed",
        lambda now: now.runtime.failed_batches,
    ),
    Counter(
        "lsa_integrity_failures",
        "findings",
        "Times that an idle server found its own records inconsistent; always a bug, please report it",
        lambda now: now.runtime.integrity_failures,
    ),
    Counter(
        "lsa_graphless_steps",
        "steps",
        "Decode steps that read more than the CUDA graphs' buffers hold, so without one",
        lambda now: now.runtime.graphless_steps,
    ),
    Counter("lsa_group_steps", "steps", "Decode steps with groups", lambda now: now.groups.steps),
    Counter(
        "lsa_group_saved_reads",
        "pages",
        "Pages that were not read again in them, because a group read them once",
        lambda now: now.groups.saved_reads,
    ),
    Counter(
        "lsa_group_added_reads",
        "pages",
        "Pages that requests read in them without having chosen them",
        lambda now: now.groups.added_reads,
    ),
    Counter(
        "lsa_group_exchanged_pages",
        "pages",
        "Pages of sets that are there because their group reads them (`group_margin`)",
        lambda now: now.groups.exchanged_pages,
    ),
    Counter(
        "lsa_groups_formed",
        "batches",
        "Times that groups were formed: a request came, went, or reads another set",
        lambda now: now.groups.formed,
    ),
    Counter(
        "lsa_group_host_seconds",
        "seconds",
        "Time that the scheduler spent on forming them",
        lambda now: now.groups.host_seconds,
    ),
    Counter("lsa_prompt_tokens", "tokens", "Tokens of admitted prompts", lambda now: now.runtime.prefill.prompt_tokens),
    Counter(
        "lsa_prefix_hit_tokens",
        "tokens",
        "Of these, tokens found in the radix tree",
        lambda now: now.runtime.prefill.radix_hit_tokens,
    ),
    Counter(
        "lsa_config_changes",
        "changes",
        "Times that the configuration was changed since the start",
        lambda now: now.runtime.config_changes,
    ),
    Counter(
        "lsa_weight_updates",
        "updates",
        "Times that the model's weights were changed since the start",
        lambda now: now.runtime.weight_updates,
    ),
)
"""In the order of ``docs/metrics.md``."""
