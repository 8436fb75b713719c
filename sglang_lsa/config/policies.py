"""Names of the policies, and what a server needs for each. What they do is in ``sglang_lsa.engine.policies``."""

from __future__ import annotations

from typing import NamedTuple

FULL = "full"
"""Reads all pages: there is nothing to score."""


class Offer(NamedTuple):
    """What a policy needs, of the server and of the model. One that needs neither attention nor index fits every model.

    Attributes:
        trained: a checkpoint, trained for the model's weights (``--lsa-indexer``).
        attention: it looks at queries and keys of attention, which a model with an index of its own does not show.
        native_index: it looks at the model's own index.
    """

    trained: bool = False
    attention: bool = False
    native_index: bool = False


POLICIES: dict[str, Offer] = {
    "indexer": Offer(trained=True, attention=True),
    "retriever": Offer(trained=True, native_index=True),
    "quest": Offer(attention=True),
    "native": Offer(native_index=True),
    "recency": Offer(),
    "random": Offer(),
    FULL: Offer(),
}
"""All, those of extensions too (``engine.policies.register``). The first one that a server offers is its default."""


def offered(indexer: str | None, index: bool | None = False) -> tuple[str, ...]:
    """Names that may be asked of a server with this ``--lsa-indexer``.

    Args:
        index: whether its model has an index of its own; None where that is not known, and either may be so.
    """
    return tuple(
        name
        for name, offer in POLICIES.items()
        if (indexer or not offer.trained)
        and not (index is True and offer.attention)
        and not (index is False and offer.native_index)
    )


def looks_at_index(policy: str | None) -> bool | None:
    """Whether a model that this policy fits has an index of its own; None for one that fits every model."""
    offer = POLICIES.get(policy or "", Offer())
    return offer.native_index if offer.native_index or offer.attention else None
