"""Names of the policies, and what a server needs for each. What they do is in ``sglang_lsa.engine.policies``."""

from __future__ import annotations

from typing import NamedTuple

FULL = "full"
"""Reads all pages: there is nothing to score."""


class Offer(NamedTuple):
    """What a server must have been given to offer a policy."""

    trained: bool = False
    """A checkpoint, trained for the model's weights (``--lsa-indexer``)."""


POLICIES: dict[str, Offer] = {
    "indexer": Offer(trained=True),
    "quest": Offer(),
    "recency": Offer(),
    "random": Offer(),
    FULL: Offer(),
}
"""All, those of extensions too (``engine.policies.register``). The first one that a server offers is its default."""


def offered(indexer: str | None) -> tuple[str, ...]:
    """Names that may be asked of a server with this ``--lsa-indexer``."""
    return tuple(name for name, offer in POLICIES.items() if indexer or not offer.trained)
