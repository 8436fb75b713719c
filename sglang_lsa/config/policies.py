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
        expects: it may know how much of the attention a set will cover, so that its sets can be as large as they need
            to be (budget auto); whether it does is in its checkpoint.
    """

    trained: bool = False
    attention: bool = False
    native_index: bool = False
    expects: bool = False


POLICIES: dict[str, Offer] = {
    "indexer": Offer(trained=True, attention=True, expects=True),
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


def offer_of(policy: str | None) -> Offer:
    """What a policy needs; nothing, of one that is not known."""
    return POLICIES.get(policy or "", Offer())


def no_auto(asked: str, policy: str) -> str:
    """Why a budget of ``auto``, asked for as ``asked``, cannot go with this policy, and what can."""
    able = [name for name, offer in POLICIES.items() if offer.expects]
    return (
        f"{asked} auto does not go with the policy {policy}, whose scores do not tell how much of the attention a set "
        f"covers: use the policy {' or '.join(able)} (--lsa-indexer, or --lsa-calibrate cached), or a budget that is "
        "a number, such as 0.135"
    )


def looks_at_index(policy: str | None) -> bool | None:
    """Whether a model that this policy fits has an index of its own; None for one that fits every model."""
    offer = offer_of(policy)
    return offer.native_index if offer.native_index or offer.attention else None
