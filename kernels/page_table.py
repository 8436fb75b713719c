"""page_table: the token slots that attention reads, from resident pages and a request's tail."""

from __future__ import annotations

import torch


def resident_slots(
    resident_pages: torch.Tensor,
    resident_count: torch.Tensor,
    tail_start: torch.Tensor,
    req_to_token: torch.Tensor,
    v2p: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    page: int,
) -> list[torch.Tensor]:
    """Physical slots of each request: its resident pages in order, then every token from ``tail_start`` pages on.

    A dense request has no resident pages and a tail that starts at 0.

    Args:
        resident_pages: int64 ``[requests + 1, max_resident]`` physical page ids by request row; row 0 is padding.
        resident_count: int64 ``[requests + 1]`` how many of them count.
        tail_start: int64 ``[requests + 1]`` in pages; all tokens from there on are read.
        req_to_token: ``[requests + 1, max_context]`` SGLang's table of virtual slots.
        v2p: int64 ``[virtual_pages + 1]`` physical page of a virtual page.
        rows: int64 ``[batch]`` request rows of this batch.
        seq_lens: int64 ``[batch]`` tokens of each request, the new one included.
        page: tokens in a page.

    Returns:
        One int64 tensor of slots per request, in order of position.
    """
    offsets = torch.arange(page, device=resident_pages.device)
    slots = []
    for row, length in zip(rows.tolist(), seq_lens.tolist(), strict=True):
        kept = resident_pages[row, : int(resident_count[row])]
        tail = physical_slots(req_to_token[row, int(tail_start[row]) * page : length], v2p, page)
        slots.append(torch.cat(((kept[:, None] * page + offsets).flatten(), tail)))
    return slots


def physical_slots(virtual: torch.Tensor, v2p: torch.Tensor, page: int) -> torch.Tensor:
    """Physical slots of virtual slots, int64, any shape."""
    virtual = virtual.long()
    return v2p[virtual // page] * page + virtual % page
