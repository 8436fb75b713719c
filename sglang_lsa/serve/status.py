"""What one scheduler process shows of itself: the body of ``/lsa/status`` and of ``internal_states[0]["lsa"]``.

Counters only, bounded whatever the server has to do; single requests are in ``sglang_lsa.serve.one_request``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sglang_lsa.engine.policies import Indexer
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.serve.metrics import measure
from sglang_lsa.serve.read_together import Figures

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


def status(runtime: LSARuntime) -> dict[str, Any]:
    """Plain JSON values; bytes are bytes, pages have ``page_size`` tokens."""
    values, pager, ledger = measure(runtime), runtime.pager, runtime.pager.ledger
    return {
        "policy": runtime.config.policy,
        "budget": runtime.config.budget,
        "window": runtime.config.window,
        **config_in_force(runtime),
        "indexer": indexer(runtime),
        "rows": runtime.table.rows,
        "page_size": pager.page,
        "page_bytes": pager.page_bytes,
        "virtual": {"pages": values["lsa_virtual_pages"], "allocated": values["lsa_virtual_pages_allocated"]},
        "physical": {
            "pages": values["lsa_device_pages"],
            "held": values["lsa_device_pages_held"],
            "cached": values["lsa_device_pages_cached"],
            "free": ledger.physical_pages - ledger.device_pages,
            "promised": values["lsa_promised_pages"],
            "kv_bytes": (ledger.physical_pages + 1) * pager.page_bytes,
            "overhead_bytes": overhead_bytes(runtime),
        },
        "host": {
            "pages": values["lsa_host_pages"],
            "bytes": values["lsa_host_bytes"],
            "mirror_bytes": values["lsa_host_mirror_bytes"],
        },
        "recalls": {
            "pages": values["lsa_recalled_pages"],
            "bytes": values["lsa_recalled_bytes"],
            "seconds": values["lsa_recall_seconds"],
            "prefetched_pages": values["lsa_prefetched_pages"],
            "late_pages": values["lsa_late_pages"],
            "warmed_pages": values["lsa_warmed_pages"],
        },
        "prefill": {
            "streamed_passes": values["lsa_streamed_passes"],
            "streamed_pages": values["lsa_streamed_pages"],
            "streamed_bytes": values["lsa_streamed_pages"] * pager.page_bytes,
            "resident_prompts": values["lsa_resident_prompts"],
        },
        "pressure": {
            "admission_waits": values["lsa_admission_waits"],
            "paced_passes": values["lsa_paced_passes"],
            "shrunk_sets": values["lsa_shrunk_sets"],
            "retractions": values["lsa_retractions"],
            "host_evicted_pages": values["lsa_host_evicted_pages"],
        },
        "weights": {
            "updates": values["lsa_weight_updates"],
            "indexer_is_stale": bool(values["lsa_indexer_stale"]),
        },
        "failures": {
            "refreshes": values["lsa_refresh_failures"],
            "batches": values["lsa_failed_batches"],
            "integrity": values["lsa_integrity_failures"],
        },
        "stores": {"pages": values["lsa_stored_pages"], "bytes": values["lsa_stored_pages"] * pager.page_bytes},
        "evictions": values["lsa_evicted_pages"],
        "refreshes": values["lsa_refreshes"],
        "refresh_host_seconds": values["lsa_refresh_host_seconds"],
        "refresh_device_seconds": values["lsa_refresh_device_seconds"],
        "stalls": values["lsa_stalls"],
        "graphless_steps": values["lsa_graphless_steps"],
        "page_reads": pager.page_index.reads,
        "fallbacks": values["lsa_fallbacks"],
        "widened_sets": values["lsa_widened_sets"],
        "collapsed_sets": values["lsa_collapsed_sets"],
        "radix": {"hit_tokens": values["lsa_prefix_hit_tokens"], "prompt_tokens": values["lsa_prompt_tokens"]},
        "ranks": {"size": values["lsa_ranks"], "checks": values["lsa_rank_checks"]},
        "running": running(runtime),
        "groups": groups(runtime),
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


def groups(runtime: LSARuntime) -> dict[str, float] | None:
    """:class:`Figures`; None where no groups are formed."""
    return dataclasses.asdict(Figures.of(runtime)) if runtime.groups is not None else None


def config_in_force(runtime: LSARuntime) -> dict[str, Any]:
    """The configuration, how often it was changed since the start, and when last (seconds since 1970)."""
    return {
        "config": dataclasses.asdict(runtime.config),
        "config_changes": runtime.config_changes,
        "config_changed_at": runtime.config_changed_at,
    }


def indexer(runtime: LSARuntime) -> dict[str, Any] | None:
    """What chooses pages by a model's heads: whether it was trained or calibrated at start, of which (layer, head)."""
    policy = runtime.policies.get("indexer")
    if not isinstance(policy, Indexer):
        return None
    config = policy.indexer.config
    return {
        "trained": config.trained,
        "heads": [list(head) for head in config.heads],
        "threshold": config.threshold,
        "coverage": config.coverage,
        "expectation": expectation(runtime, config.expectation),
    }


def expectation(runtime: LSARuntime, measured: Expectation | None) -> dict[str, Any] | None:
    """What sets with a budget of ``auto`` are expected to take here; None where it is not known what sets cover."""
    if measured is None:
        return None
    target = runtime.config.target_coverage
    return {
        "source": measured.source,
        "target_coverage": target,
        "told": round(measured.told_for(target), 4),
        "pages": round(measured.pages_for(target), 4),
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
    if runtime.groups is not None:
        overhead["groups"] = runtime.groups.nbytes
    overhead |= {name: policy.nbytes for name, policy in runtime.policies.items() if policy.nbytes}
    return overhead | runtime.beside
