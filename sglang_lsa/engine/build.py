"""Composition: makes the runtime's parts from the configuration, the pools and the model's shape."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from sglang_lsa.config import FULL, POLICIES, LSAConfig
from sglang_lsa.engine.grouping import Groups
from sglang_lsa.engine.lookahead import Lookahead
from sglang_lsa.engine.native_index import IndexKeys, IndexObserver, NativeIndex, scorer_layers
from sglang_lsa.engine.observe import PageKeys, QueryObserver, observed_layers
from sglang_lsa.engine.observe_index import IndexRings, KeptIndexKeys
from sglang_lsa.engine.policies import Parts, Policy, bounds_needed, needed, positions
from sglang_lsa.engine.request import Request
from sglang_lsa.engine.score import SCORE_LAG
from sglang_lsa.engine.sizing import longest_dense, max_resident_pages
from sglang_lsa.indexer.recorder import Recorder
from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.memory.scores import Scores
from sglang_lsa.memory.staging import Staging, decoded_bytes, sums_bytes

logger = logging.getLogger(__name__)


def applicable(config: LSAConfig, pager: Pager) -> LSAConfig:
    """The configuration with ``min_context`` as it applies: no request reads more than the device pool can hold."""
    longest = longest_dense(pager.ledger.physical_pages, pager.page)
    if config.min_context <= longest:
        return config
    logger.warning(
        "LSA: --lsa-min-context %d is more than half of the device pool; requests are pruned from %d tokens on",
        config.min_context,
        longest,
    )
    return dataclasses.replace(config, min_context=longest)


def observer(
    config: LSAConfig, layout: KVLayout, rows: int, q_heads: int, index: NativeIndex | None = None
) -> QueryObserver | IndexObserver:
    """Of the recent queries of ``rows`` requests, or of what the model's own index sees of their last tokens."""
    if index is not None:
        return index_observer(config, index, rows, layout)
    layers = observed_layers(config, len(layout.by_layer))
    of_queries = layout.head_dim, layout.compute_dtype, layout.device
    return QueryObserver(rows, positions(config), layers, q_heads, *of_queries)


def index_observer(config: LSAConfig, index: NativeIndex, rows: int, layout: KVLayout) -> IndexObserver:
    """Of ``rows`` requests, in the layers that choose pages."""
    layers = scorer_layers(config, index)
    return IndexRings(rows, config.query_tokens, layers, index, bool(config.indexer), True, layout.device)


def page_keys(config: LSAConfig, pager: Pager, index: NativeIndex | None = None) -> PageKeys | IndexKeys:
    """Bounds of the keys of every virtual page, in the layers whose queries are observed, if anything looks at them; or
    their index keys, in the layers that choose pages."""
    if index is not None:
        return index_keys(config, pager, index)
    layers = observed_layers(config, len(pager.layout.by_layer)) if bounds_needed(config) else ()
    return PageKeys(pager.ledger.virtual_pages, pager.layout, layers)


def index_keys(config: LSAConfig, pager: Pager, index: NativeIndex) -> IndexKeys:
    """Of every virtual page, in the layers that choose pages."""
    return KeptIndexKeys(pager.ledger.virtual_pages, pager.layout.index_buffers, scorer_layers(config, index))


def resident_table(pager: Pager, rows: int, max_context: int) -> ResidentTable:
    """A row for each of ``rows`` requests."""
    most = max_resident_pages(max_context, pager.ledger.physical_pages, pager.page)
    return ResidentTable(rows, most, pager.page, pager.device)


def policies(
    config: LSAConfig,
    pager: Pager,
    observer: QueryObserver | IndexObserver,
    page_keys: PageKeys | IndexKeys,
    softmax_scale: float,
    index: NativeIndex | None = None,
) -> dict[str, Policy]:
    """Those that requests may ask for, by name; ``full`` needs none.

    Raises:
        ValueError: the server's own is none of them, or one cannot be made.
    """
    pages, ranks = pager.ledger.virtual_pages, pager.ranks
    parts = Parts(config, pager.layout, pages, observer, page_keys, softmax_scale, index, ranks)
    found = {policy.name: policy.build(parts) for policy in needed(config, index is not None)}
    if config.policy not in (*found, FULL):
        raise ValueError(
            f"--lsa-policy {config.policy} does not fit this model: use one of {', '.join((*found, FULL))}"
        )
    return found


def trained(policies: Mapping[str, Policy]) -> Policy | None:
    """The policy that was trained for the model's weights, if the server was given one."""
    return next((policy for name, policy in policies.items() if POLICIES[name].trained), None)


def recorder(
    config: LSAConfig,
    layout: KVLayout,
    page_keys: PageKeys | IndexKeys,
    q_heads: int,
    softmax_scale: float,
    hidden_size: int,
) -> Recorder | None:
    """What writes training data, if the server was told to.

    Raises:
        ValueError: attention of this model is not recorded.
    """
    if not config.record:
        return None
    if not isinstance(page_keys, PageKeys):
        raise ValueError(f"--lsa-record {config.record}: a {type(layout).__name__} shows no keys: leave it out")
    layers = observed_layers(config, len(layout.by_layer))
    return Recorder(
        config.record, layers, config.query_tokens, layout, q_heads, softmax_scale, page_keys.table, hidden_size
    )


def lookahead(
    config: LSAConfig, pager: Pager, table: ResidentTable, policies: Mapping[str, Policy], scores: Scores | None = None
) -> Lookahead:
    """On a CPU a refresh happens at once; on a GPU it is begun some steps before its window."""
    lead, lag = (config.prefetch_steps, SCORE_LAG) if pager.device.type == "cuda" else (0, 0)
    thresholds = {name: policy.threshold for name, policy in policies.items() if policy.calibrated}
    expectations = {name: told for name, policy in policies.items() if (told := policy.expectation) is not None}
    found = Lookahead(config, pager, table, policies, lead, lag, thresholds, scores, expectations)
    if config.auto and (problem := found.rules.no_auto(str(config.policy))) is not None:
        raise ValueError(f"--lsa-{problem}")
    return found


def groups(config: LSAConfig, lookahead: Lookahead, requests: Mapping[str, Request]) -> Groups | None:
    """What forms groups of requests over one prefix, if the server was told to; with a margin, their sets are chosen
    with a view to what groups read. Groups are others when a member's window begins, so windows keep time."""
    if config.groups is not True:  # auto is decided with the arguments of the server, see patches/automatic.py
        return None
    found = Groups(lookahead.sets)
    lookahead.clock.keep_time()
    if config.group_margin:
        lookahead.refresher.chooser.company = lambda choosing: found.company(choosing, requests.values())
    return found


def staging(config: LSAConfig, pager: Pager) -> Staging | None:
    """Buffers for pages that prompts read from the host mirror; None where prompts are whole on the device."""
    if pager.layout.whole_prompts:
        return None
    mirror = pager.mirror
    return Staging(pager.layout, mirror.pages, config.staging_pages, lambda: pager.compute(), mirror.locked_together)


def staging_bytes(staging: Staging | None, layout: KVLayout, chunk_tokens: int | None, q_heads: int) -> int:
    """Device bytes that prompts need to read the host mirror; no context enters."""
    if staging is None:
        return 0
    sums = sums_bytes(chunk_tokens or 0, q_heads, layout.head_dim)
    return staging.nbytes + decoded_bytes(staging.pages, layout.shape) + sums
