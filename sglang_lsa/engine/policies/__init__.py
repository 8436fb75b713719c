"""score: the policies by name, and what those that a server offers need together."""

from __future__ import annotations

from sglang_lsa.config import POLICIES, LSAConfig, Offer, offered
from sglang_lsa.engine.policies.base import Parts, Policy
from sglang_lsa.engine.policies.indexer import Indexer
from sglang_lsa.engine.policies.native import Native
from sglang_lsa.engine.policies.quest import Quest
from sglang_lsa.engine.policies.random import Random
from sglang_lsa.engine.policies.recency import Recency
from sglang_lsa.engine.policies.retriever import Retriever

__all__ = [
    "REGISTRY",
    "Indexer",
    "Native",
    "Parts",
    "Policy",
    "Quest",
    "Random",
    "Recency",
    "Retriever",
    "bounds_needed",
    "needed",
    "positions",
    "register",
]

REGISTRY: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Indexer, Retriever, Quest, Native, Recency, Random)
}
"""By name; ``full`` scores nothing."""


def register(policy: type[Policy]) -> type[Policy]:
    """Add a policy of an extension; usable as a decorator. Where it can be asked for: in every process that did this.

    Raises:
        ValueError: there is one of that name.
    """
    if policy.name in REGISTRY or policy.name in POLICIES:
        raise ValueError(f"there is a policy {policy.name!r} already: give {policy.__name__} another name")
    REGISTRY[policy.name] = policy
    POLICIES[policy.name] = Offer(
        attention=policy.queries and not policy.index, native_index=policy.index, expects=policy.calibrated
    )
    return policy


def needed(config: LSAConfig, index: bool = False) -> list[type[Policy]]:
    """Those that requests may ask of a server of this configuration, whatever its own is.

    Args:
        index: the model has an index of its own, and shows neither queries nor keys of attention.
    """
    return [REGISTRY[name] for name in offered(config.indexer, index) if name in REGISTRY]


def bounds_needed(config: LSAConfig) -> bool:
    """Whether anything looks at the bounds of the keys of pages: a policy, or a recording."""
    return bool(config.record) or any(policy.page_keys for policy in needed(config))


def positions(config: LSAConfig) -> int:
    """Recent positions whose queries are kept: as many as any policy lets vote."""
    return max((policy.positions(config) for policy in needed(config) if policy.queries), default=1)
