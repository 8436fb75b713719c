"""Device memory that an answer needed while it was generated, of what all of its KV would take."""

from __future__ import annotations

from typing import Any

from sglang_lsa.config import PAGE_SIZE, read_sets
from sglang_lsa.engine.request import HISTORY_WINDOWS
from sglang_lsa.evaluation.arms import FULL
from sglang_lsa.memory.pages import pages_spanned


def footprint(
    arm: str, sets: str, prompt_tokens: int, new_tokens: int, status: dict[str, Any]
) -> dict[str, float | None]:
    """Mean over decode steps, of one request alone; None where there was no such step.

    Pages of the resident set, keys that the arm's selector keeps of *all* pages, the request's recent queries, and its
    row of the page tables. Weights of an indexer (0.2 MB) and buffers for CUDA graphs and streamed prompts are not a
    request's; ``/lsa/status`` has them, and the keys that a server with an indexer keeps for Quest as well.

    Args:
        sets: of the request, in the written form of ``/lsa/requests``.
        status: the whole ``/lsa/status``.

    Returns:
        ``resident`` and ``footprint``, shares of the context's KV bytes; ``device_bytes``, ``host_bytes``.
    """
    pages = pages_spanned(prompt_tokens + new_tokens, PAGE_SIZE)
    kv = float(pages * status["page_bytes"])
    if arm == FULL:
        return {"resident": 1.0, "footprint": 1.0, "device_bytes": kv, "host_bytes": kv}
    if new_tokens < 2:
        return {"resident": None, "footprint": None, "device_bytes": None, "host_bytes": kv}
    resident = mean_resident(sets, prompt_tokens, new_tokens)
    overhead, rows = status["physical"]["overhead_bytes"], status["rows"]
    virtual = status["virtual"]["pages"] + 1
    keys = {"lsa": overhead.get("indexer", 0), "quest": overhead["page_keys"]}.get(arm, 0) * pages / virtual
    queries = overhead["queries"] / rows if arm in ("lsa", "quest") else 0.0
    device = resident * status["page_bytes"] + keys + queries + overhead["tables"] / rows
    return {"resident": resident / pages, "footprint": device / kv, "device_bytes": device, "host_bytes": kv}


def mean_resident(sets: str, prompt_tokens: int, new_tokens: int) -> float:
    """Pages that decode steps read on average; there is a step for every new token but the first.

    Steps before the first set read everything. The server remembers the last 32 sets: where there are so many, steps
    before them count as the first of these.
    """
    begins = [(one.tokens, one.tail_start, len(one.positions)) for one in read_sets(sets)]
    if len(begins) >= HISTORY_WINDOWS:
        begins[0] = (0, *begins[0][1:])
    total = 0.0
    contexts = range(prompt_tokens + 1, prompt_tokens + new_tokens)
    for context in contexts:
        tail, chosen = next(((tail, chosen) for at, tail, chosen in reversed(begins) if at <= context), (0, 0))
        total += chosen + pages_spanned(context, PAGE_SIZE) - tail
    return total / len(contexts)
