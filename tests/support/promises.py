"""What tests ask of promises."""

from __future__ import annotations

from sglang_lsa.memory.pager import Pager


def owed(pager: Pager) -> dict[str, int]:
    """Device pages that are owed to each holder; those that are owed nothing are left out."""
    reservations = pager.reservations
    pages_owed = {holder: reservations.owed(holder) for holder in reservations.holders()}
    assert sum(pages_owed.values()) == reservations.total
    return {holder: pages for holder, pages in pages_owed.items() if pages}
