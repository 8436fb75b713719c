"""Memory plan: how many tokens the device pool and the host mirror hold, decided before anything is allocated."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.group_buffers import planning_bytes
from sglang_lsa.engine.observe import observed_layers
from sglang_lsa.engine.policies import bounds_needed, needed, positions
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.memory.layout.base import PageShape
from sglang_lsa.memory.mirror import GB, available_host_memory, require_host_memory
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.memory.staging import decoded_bytes, staging_bytes, sums_bytes

logger = logging.getLogger(__name__)

HOST_SHARE = {"cpu": 0.2, "cuda": 0.6}
"""Part of the free host memory that the mirror takes unless told otherwise. On a CPU the model lives there, too."""


def round_up_gb(bytes_: int) -> float:
    """GB with two digits, never less than ``bytes_``."""
    return math.ceil(bytes_ / GB * 100) / 100


LARGEST_SHARE = 0.5
"""No resident set is predicted larger than this part of the device pool, whatever its budget."""


@dataclass(frozen=True)
class Needs:
    """What LSA's own buffers on the device are made of.

    Attributes:
        rows: requests that run at the same time, and one for padding.
        graph_batches: for how many requests decode CUDA graphs are captured; empty without graphs.
        context_tokens: longest context that SGLang's table has room for.
        page: tokens of a page.
        page_key_bytes: of the bounds of keys of one page.
        row_bytes: selector's bytes for one request.
        staging_bytes: what prompts need to read the host mirror: two buffers, and a chunk's sums; no context enters.
        policy_bytes: what policies keep of one page themselves, by name, and what SGLang keeps of every virtual page.
        fixed_bytes: what policies take whatever is served, by name.
        map_bytes: of one entry of the page map, which on a CPU is the ledger's own.
        virtual_share: most of the device's budget for what is kept of every virtual page, where the size of the mirror
            is left open.
        on_gpu: attention plans on the device what groups read.
    """

    rows: int
    graph_batches: tuple[int, ...]
    context_tokens: int
    page: int
    page_key_bytes: int
    row_bytes: int
    staging_bytes: int = 0
    policy_bytes: Mapping[str, int] = field(default_factory=dict)
    map_bytes: int = 4
    virtual_share: float = 1.0
    fixed_bytes: Mapping[str, int] = field(default_factory=dict)
    on_gpu: bool = False

    def most_virtual(self, budgeted_bytes: int) -> float:
        """Virtual pages whose own bytes on the device are within that share."""
        if self.virtual_share >= 1:
            return math.inf
        each = self.page_key_bytes + self.map_bytes + sum(self.policy_bytes.values())
        return int(budgeted_bytes * self.virtual_share) // max(1, each)

    def overhead(self, config: LSAConfig, physical_tokens: int, virtual_tokens: int) -> dict[str, int]:
        """Device bytes beside KV, by purpose, with the names that ``/lsa/status`` gives them."""
        pages = virtual_tokens // self.page + 1
        columns = 2 + max_resident_pages(self.context_tokens, physical_tokens // self.page, self.page)
        largest = max(self.graph_batches, default=0)
        graph = graph_tokens(config, largest, self.context_tokens, physical_tokens, self.page)
        overhead = {
            "page_keys": pages * self.page_key_bytes,
            "queries": self.rows * self.row_bytes,
            "tables": self.rows * (columns + 2) * 4 + pages * self.map_bytes,
            "graph_indices": graph * 4,
            "staging": self.staging_bytes,
        }
        if config.groups is True:
            planning = (self.rows, self.graph_batches, physical_tokens // self.page)
            overhead["groups"] = self.rows * columns * 4 + (planning_bytes(*planning) if self.on_gpu else 0)
        return overhead | {name: pages * size for name, size in self.policy_bytes.items()} | dict(self.fixed_bytes)


def selector_needs(
    config: LSAConfig,
    page: PageShape,
    *,
    rows: int,
    chunk_tokens: int,
    graph_batches: tuple[int, ...],
    context_tokens: int,
    layers: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    map_bytes: int = 4,
    ranks: int = 1,
    on_gpu: bool = False,
) -> Needs:
    """What the observers, page keys and staging take, for pages and a model of this shape.

    Args:
        kv_heads, head_dim, itemsize: of the keys that Quest looks at, and of queries.
        ranks: that share the model; everything here is of one of them.
    """
    observed = len(observed_layers(config, layers))
    page_key_bytes = observed * 2 * kv_heads * head_dim * itemsize if bounds_needed(config) else 0
    row_bytes = positions(config) * observed * q_heads * head_dim * itemsize
    policy_bytes = {policy.name: size for policy in needed(config) if (size := policy.rank_page_bytes(config, ranks))}
    staging = staging_bytes(config.staging_pages, page) + decoded_bytes(config.staging_pages, page)
    staging += sums_bytes(chunk_tokens, q_heads, head_dim)
    bytes_ = (page_key_bytes, row_bytes, staging, policy_bytes, map_bytes)
    return Needs(rows, graph_batches, context_tokens, page.page_tokens, *bytes_, on_gpu=on_gpu)


def largest_set(physical_pages: int, columns: int) -> float:
    """Pages of the largest resident set that is predicted, with a resident table of so many columns."""
    return min(physical_pages * LARGEST_SHARE, columns)


def set_bounds(context_pages: int, budget: float, min_pages: int, largest: float) -> tuple[float, int]:
    """Budget and least pages as they apply to a request when no set is larger than ``largest`` pages."""
    return min(budget, largest / context_pages), min(min_pages, int(largest))


def expected_pages(
    expectation: Expectation, target: float, context_pages: int, stay: int, min_pages: int, most: int
) -> int:
    """Pages that a set is expected to take that is as large as it needs to be.

    Args:
        target: share of attention that it is to cover.
        stay: pages that are in it whatever their score.
        min_pages, most: bounds of it.
    """
    scored = math.ceil(expectation.pages_for(target) * max(0, context_pages - stay))
    return min(most, max(min_pages, stay + scored))


def longest_dense(physical_pages: int, page: int) -> int:
    """Requests of at least so many tokens are pruned, whatever ``min_context`` says: half of the device pool."""
    return physical_pages * page // 2


def max_resident_pages(context_tokens: int, physical_pages: int, page: int) -> int:
    """Columns of the resident table: no set is larger than a request, or than its share of the device pool."""
    return min(pages_spanned(context_tokens, page), int(physical_pages * LARGEST_SHARE) + 1)


def graph_tokens(config: LSAConfig, batch: int, context_tokens: int, physical_tokens: int, page: int) -> int:
    """Tokens that a decode CUDA graph can read, all requests together; larger batches run without a graph.

    As many as ``batch`` requests of the longest context read within the budget, and as the device pool holds.
    """
    if batch == 0:
        return 0
    window = pages_spanned(config.window + config.prefetch_steps, page) + 1  # what a request may grow by meanwhile
    budget = max(config.largest_budget * config.widen, config.fallback_budget or 0.0)
    least = int(config.least_pages(page) * config.widen) * page
    resident = max(int(context_tokens * budget), least, config.min_context)
    return max(batch * min(context_tokens, resident + window * page), physical_tokens + batch)


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in tokens, multiples of the page size, and device bytes beside KV by purpose."""

    physical_tokens: int
    virtual_tokens: int
    page: PageShape
    overhead: Mapping[str, int] = field(default_factory=dict)

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token, all layers."""
        return self.page.page_bytes // self.page.page_tokens


def plan_memory(
    config: LSAConfig,
    *,
    page: PageShape,
    budgeted_tokens: int,
    context_tokens: int,
    device: str,
    needs: Needs | None = None,
    local_ranks: int = 1,
) -> MemoryPlan:
    """Size device pool and host mirror.

    Args:
        page: what a page of KV weighs.
        budgeted_tokens: what SGLang's own memory fraction (or ``--max-total-tokens``) allows on the device.
        context_tokens: longest context of the model.
        device: ``cpu`` or ``cuda``.
        needs: LSA's own buffers; on a GPU they are taken from the budget before KV.
        local_ranks: that share this host's memory; everything here is of one of them.

    Raises:
        ValueError: more host memory is asked for than is free, or the pools would be too small to serve anything.
    """
    page_bytes, page_tokens = page.page_bytes, page.page_tokens
    if config.host_memory_gb is not None:
        host_bytes = int(config.host_memory_gb * GB)
        require_host_memory(host_bytes, f"--lsa-host-memory-gb {config.host_memory_gb}", "lower it")
    else:
        host_bytes = int(available_host_memory() * HOST_SHARE[device])
    host_bytes //= local_ranks
    virtual = (host_bytes // page_bytes - 1) * page_tokens
    if config.host_memory_gb is None and needs is not None and device == "cuda":
        most = needs.most_virtual(budgeted_tokens // page_tokens * page_bytes)
        virtual = virtual if virtual <= most * page_tokens else int(most) * page_tokens
    if config.device_tokens is not None:
        physical = config.device_tokens
    elif config.device_memory_gb is not None:
        physical = int(config.device_memory_gb * GB) * page_tokens // page_bytes
    elif device == "cpu":  # SGLang would take nearly all memory; a quarter of the mirror, but one whole context
        physical = min(virtual, max(virtual // 4, context_tokens + 2 * page_tokens))
    else:
        physical = min(budgeted_tokens, virtual)
        if physical < budgeted_tokens:
            logger.warning(
                "LSA: the device has room for %d tokens of KV, the host mirror for %d: raise --lsa-host-memory-gb to "
                "use the device fully",
                budgeted_tokens,
                virtual,
            )
    buffers = needs.overhead(config, min(physical, budgeted_tokens), virtual) if needs and device == "cuda" else {}
    left = budgeted_tokens - -(-sum(buffers.values()) // page_bytes) * page_tokens
    physical = min(physical, left) // page_tokens * page_tokens
    if physical < 4 * page_tokens:
        pages = max(0, physical) // page_tokens
        raise ValueError(
            f"the device pool would hold {pages * page_tokens} tokens ({pages * page_bytes / GB:.3f} GB): "
            f"give it at least {4 * page_tokens} tokens ({4 * page_bytes / GB:.3f} GB)"
        )
    if virtual < physical:
        least = (physical // page_tokens + 1) * page_bytes * local_ranks
        raise ValueError(
            f"the host mirror would hold {virtual} tokens ({host_bytes / GB:.2f} GB), fewer than the device pool's "
            f"{physical}: raise --lsa-host-memory-gb to {round_up_gb(least)} or more, or lower --lsa-device-tokens"
        )
    overhead = needs.overhead(config, physical, virtual) if needs else {}  # of a smaller pool: no more than was taken
    plan = MemoryPlan(physical, virtual, page, overhead)
    announce(plan)
    return plan


def smallest(config: LSAConfig, plans: Sequence[MemoryPlan], needs: Needs) -> MemoryPlan:
    """What all ranks have room for, of plans for pages of one shape."""
    physical = min(plan.physical_tokens for plan in plans)
    virtual = min(plan.virtual_tokens for plan in plans)
    return MemoryPlan(physical, virtual, plans[0].page, needs.overhead(config, physical, virtual))


def announce(plan: MemoryPlan) -> None:
    """Say in the log what was planned."""
    page, physical, virtual = plan.page, plan.physical_tokens, plan.virtual_tokens
    page_bytes, page_tokens, overhead = page.page_bytes, page.page_tokens, plan.overhead
    logger.info(
        "LSA: device pool %d tokens (%.2f GB), host mirror %d tokens (%.2f GB), %d KV bytes a token%s",
        physical,
        physical // page_tokens * page_bytes / GB,
        virtual,
        virtual // page_tokens * page_bytes / GB,
        plan.token_bytes,
        "".join(f", {name.replace('_', ' ')} {size / GB:.3f} GB" for name, size in overhead.items()),
    )
