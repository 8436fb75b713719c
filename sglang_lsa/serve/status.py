"""What one scheduler process shows of itself: the body of ``/lsa/status`` and of ``internal_states[0]["lsa"]``.

Counters only, bounded whatever the server has to do; single requests are in ``sglang_lsa.serve.one_request``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sglang_lsa.config import PAGE_SIZE

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


def status(runtime: LSARuntime) -> dict[str, Any]:
    """Plain JSON values; bytes are bytes, pages are pages of 64 tokens."""
    pager, ledger, lookahead = runtime.pager, runtime.pager.ledger, runtime.lookahead
    return {
        "policy": runtime.config.policy,
        "budget": runtime.config.budget,
        "window": runtime.config.window,
        **config_in_force(runtime),
        "rows": runtime.table.rows,
        "page_size": PAGE_SIZE,
        "page_bytes": pager.page_bytes,
        "virtual": {"pages": ledger.virtual_pages, "allocated": ledger.allocated_pages},
        "physical": {
            "pages": ledger.physical_pages,
            "held": ledger.held_pages,
            "cached": ledger.device_pages - ledger.held_pages,
            "free": ledger.physical_pages - ledger.device_pages,
            "promised": pager.reservations.total,
            "kv_bytes": (ledger.physical_pages + 1) * pager.page_bytes,
            "overhead_bytes": overhead_bytes(runtime),
        },
        "host": {
            "pages": ledger.host_pages,
            "bytes": ledger.host_pages * pager.page_bytes,
            "mirror_bytes": pager.mirror.nbytes,
        },
        "recalls": {
            "pages": ledger.recalls,
            "bytes": ledger.recalls * pager.page_bytes,
            "seconds": pager.transfer.recall_seconds,
            "prefetched_pages": pager.prefetched_pages,
            "late_pages": pager.late_pages,
            "warmed_pages": pager.warmed_pages,
        },
        "prefill": {
            "streamed_passes": runtime.prefill.streamed_passes,
            "streamed_pages": runtime.staging.staged_pages,
            "streamed_bytes": runtime.staging.staged_pages * pager.page_bytes,
            "resident_prompts": runtime.prefill.resident_prompts,
        },
        "pressure": {
            "admission_waits": runtime.admission.waits,
            "shrunk_sets": lookahead.counts.shrunk,
            "retractions": runtime.admission.pressed,
            "host_evicted_pages": runtime.host_evicted_pages,
        },
        "weights": {
            "updates": runtime.weight_updates,
            "indexer_is_stale": runtime.weight_updates > 0 and runtime.indexer is not None,
        },
        "failures": {
            "refreshes": lookahead.counts.failures,
            "batches": runtime.failed_batches,
            "integrity": runtime.integrity_failures,
        },
        "stores": {"pages": pager.stored_pages, "bytes": pager.stored_pages * pager.page_bytes},
        "evictions": ledger.evictions,
        "refreshes": lookahead.counts.refreshes,
        "refresh_host_seconds": lookahead.counts.host_seconds,
        "refresh_device_seconds": lookahead.counts.device_seconds,
        "stalls": lookahead.counts.stalls,
        "graphless_steps": runtime.graphless_steps,
        "page_reads": pager.page_index.reads,
        "fallbacks": lookahead.counts.fallbacks,
        "widened_sets": lookahead.counts.widened,
        "collapsed_sets": lookahead.counts.collapsed,
        "radix": {"hit_tokens": runtime.prefill.radix_hit_tokens, "prompt_tokens": runtime.prefill.prompt_tokens},
        "running": running(runtime),
        "finished_requests": runtime.finished_requests,
        "decoding": {str(n): dataclasses.asdict(seen) for n, seen in runtime.decoding.items()},
    }


def running(runtime: LSARuntime) -> dict[str, int]:
    """The running requests together; pages that they share are counted for each."""
    requests = runtime.requests.values()
    sizes = [request.sizes() for request in requests]
    return {
        "requests": len(sizes),
        "decoding": sum(request.window >= 0 for request in requests),
        "dense": sum(request.resident.tail_start == 0 for request in requests),
        "context_pages": sum(context for context, _ in sizes),
        "resident_pages": sum(resident for _, resident in sizes),
    }


def config_in_force(runtime: LSARuntime) -> dict[str, Any]:
    """The configuration, how often it was changed since the start, and when last (seconds since 1970)."""
    return {
        "config": dataclasses.asdict(runtime.config),
        "config_changes": runtime.config_changes,
        "config_changed_at": runtime.config_changed_at,
    }


def overhead_bytes(runtime: LSARuntime) -> dict[str, int]:
    """Device bytes that LSA needs beside KV pages, by purpose."""
    v2p = runtime.pager.v2p
    overhead = {
        "page_keys": runtime.page_keys.nbytes,
        "queries": runtime.observer.nbytes,
        "tables": runtime.table.nbytes + runtime.everything.nbytes + v2p.numel() * v2p.element_size(),
        "graph_indices": runtime.graph_tokens * 4,
        "staging": runtime.staging_bytes,
    }
    return overhead | {name: policy.nbytes for name, policy in runtime.policies.items() if policy.nbytes}
