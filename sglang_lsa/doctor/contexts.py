"""How many contexts fit: on stock SGLang and with LSA, in the same device bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.sizing import MemoryPlan, largest_set, longest_dense, max_resident_pages
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.memory.pages import pages_spanned

DEVICE, HOST, REQUESTS = "device pool", "host mirror", "--max-running-requests"


@dataclass(frozen=True)
class Fit:
    """Contexts of ``tokens`` tokens, prompt and answer together, that can run at the same time.

    Attributes:
        stock: with their whole KV in the device pool; what LSA's buffers take on the device is KV, too.
        lsa: with a resident set each in the device pool and all of their pages in the host mirror.
        limit: what ends ``lsa``: ``device pool``, ``host mirror`` or ``--max-running-requests``.
        resident_pages: of one context, at most, or with a budget of ``auto`` what its sets are expected to take; all of
            its pages when it is not pruned.
        pages: of one context.
    """

    tokens: int
    stock: int
    lsa: int
    limit: str
    resident_pages: int
    pages: int


def fit(
    config: LSAConfig,
    plan: MemoryPlan,
    tokens: int,
    *,
    context_tokens: int,
    chunk_tokens: int | None,
    max_requests: int,
    on_gpu: bool,
    stock_tokens: int | None = None,
    expectations: Mapping[str, Expectation] | None = None,
) -> Fit:
    """Count contexts as admission does: a resident set and one page to grow into for each that decodes, and for the
    last one what its prompt needs while it is prefilled. Prefixes that contexts share are not counted on.

    Args:
        context_tokens: longest context that SGLang's table has room for.
        chunk_tokens: SGLang's chunk of prefill; None when prompts are not cut into chunks.
        max_requests: that run at the same time with LSA.
        on_gpu: LSA's buffers are taken from the device pool.
        stock_tokens: that the same bytes hold without LSA, where that is not the bytes of pages.
        expectations: of policies that know what their sets cover.
    """
    page = plan.page.page_tokens
    physical, virtual, pages = plan.physical_tokens // page, plan.virtual_tokens // page, pages_spanned(tokens, page)
    bytes_ = plan.physical_tokens * plan.token_bytes + (sum(plan.overhead.values()) if on_gpu else 0)
    stock = (bytes_ // plan.token_bytes if stock_tokens is None else stock_tokens) // tokens
    min_context = min(config.min_context, longest_dense(physical, page))
    dense = config.policy == "full" or config.largest_budget >= 1 or tokens < min_context
    if dense:
        resident = demand = pages
    else:
        largest = largest_set(physical, max_resident_pages(context_tokens, physical, page))
        resident = Rules(config, largest, {}, expectations or {}, page).expected_pages(
            pages, str(config.policy), config.largest_budget, config.target_coverage if config.auto else None
        )
        chunk = min(pages_spanned(min(tokens, chunk_tokens or tokens), page), physical // 2)
        demand = min(pages, max(chunk + 1, resident))
        if plan.page.whole_prompts or (chunk_tokens is None and pages > chunk):  # computed in place
            demand = pages
    last = physical - 1 - demand
    limits = {
        DEVICE: 1 + last // (resident + 1) if last >= 0 else 0,
        HOST: virtual // pages,
        REQUESTS: max_requests,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Fit(tokens, stock, limits[limit], limit, resident, pages)
