"""What the fields of LSAConfig may be: constants, and the checks of one that is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sglang_lsa.config.kinds import FLAG, flag_of
from sglang_lsa.config.policies import FULL, POLICIES, looks_at_index, no_auto, offer_of, offered

PREFILLS = ("exact", "resident")
AUTO = "auto"
"""The budget of sets that are as large as they need to be; ``groups`` and ``calibrate`` that depend on the device."""
SHARE = "float | str"
"""Type of the field ``budget``: a number, or :data:`AUTO`."""
SWITCH = "bool | str"
"""Type of the field ``groups``: on, off, or :data:`AUTO`."""
CALIBRATE = (AUTO, "never", "cached", "always")
PAGE_SIZE = 64
"""Tokens in one KV page; the unit of residency, of the host mirror and of radix sharing."""
RECORDED_POSITIONS = 128
"""Tokens before the first position to predict whose queries are recorded: an indexer may let that many vote."""
MOST_LOOKED_UP = 64
"""Tokens at the end of a text that a request may ask to have occurred before."""
MOST_WIDENED = 4
"""Times the pages of its budget that a set may have at most while its request repeats its prompt."""
RUNS = 32
"""Equal parts of a page whose mean keys are recorded, and of which an indexer makes its keys."""
LEAST: dict[str, float] = {
    "min_pages": 1,
    "floor_tokens": 0,
    "window": 1,
    "dense_steps": 0,
    "prompt_lookup": 0,
    "widen": 1,
    "group_margin": 0,
    "prefetch_steps": 0,
    "sink_pages": 0,
    "recent_pages": 0,
    "prompt_pages": 0,
    "min_context": 0,
    "query_tokens": 1,
    "prefill_tokens_per_step": 0,
    "prefill_burst_tokens": 0,
    "staging_pages": 1,
    "device_tokens": PAGE_SIZE * 4,
    "device_memory_gb": 0,
    "host_memory_gb": 0,
}
"""The smallest value of a field that is a number."""
BEYOND = 2**63
"""No number is as large; JSON and Python have larger ones, which nothing can be multiplied with."""


def check(config: Any) -> None:
    """See whether all fields can be what they are, one by one and together.

    Args:
        config: an LSAConfig, its policy known.

    Raises:
        ValueError: naming the first that cannot, the value seen, and what to do.
    """
    require_choice("policy", config.policy, tuple(POLICIES))
    require_choice("calibrate", config.calibrate, CALIBRATE)
    require_choice("prefill", config.prefill, PREFILLS)
    if not isinstance(config.budget, str):
        require_fraction("budget", config.budget)
    elif config.budget != AUTO:
        raise ValueError(f"budget is {config.budget!r}: use a number in (0, 1], or {AUTO}")
    require_fraction("target_coverage", config.target_coverage)
    require_fraction("max_budget", config.max_budget)
    if config.auto and config.policy != FULL and not (offer_of(config.policy).expects or config.may_calibrate):
        raise ValueError(no_auto("--lsa-budget", str(config.policy)))
    if config.threshold is not None and math.isnan(config.threshold):
        raise ValueError("threshold nan is no number: use one")
    if not 0 <= config.min_coverage <= 1:
        raise ValueError(f"min_coverage {config.min_coverage} is out of range: use a share in [0, 1]")
    if config.fallback_budget is not None:
        require_fraction("fallback_budget", config.fallback_budget)
        if isinstance(config.budget, str):
            raise ValueError(
                f"fallback_budget {config.fallback_budget} does not go with --lsa-budget {AUTO}, whose sets are as "
                "large as they need to be: leave it out, and use target_coverage and max_budget"
            )
        if config.fallback_budget < config.budget:
            raise ValueError(
                f"fallback_budget {config.fallback_budget} is below --lsa-budget {config.budget}: raise it"
            )
    for name, least in LEAST.items():
        value = getattr(config, name)
        if value is not None and not -BEYOND < value < BEYOND:
            raise ValueError(f"{called(config, name)} {value} is no size: use a finite number")
        if value is not None and value < least:
            raise ValueError(f"{called(config, name)} {value} is too small: use {least} or more")
    if config.prompt_lookup > MOST_LOOKED_UP:
        raise ValueError(f"prompt_lookup {config.prompt_lookup} is too large: use {MOST_LOOKED_UP} or less")
    if config.widen > MOST_WIDENED:
        raise ValueError(f"widen {config.widen} is too large: use {MOST_WIDENED} or less")
    if not isinstance(config.groups, bool) and config.groups != AUTO:
        raise ValueError(f"groups is {config.groups!r}: use true, false or {AUTO}")
    if config.group_margin >= 1:
        raise ValueError(f"group_margin {config.group_margin} is too large: use a share below 1")
    if config.group_margin and not config.groups:
        raise ValueError(f"group_margin {config.group_margin} does nothing without groups: set groups, or leave it out")
    if config.prefetch_steps >= config.window and config.prefetch_steps != type(config).prefetch_steps:
        raise ValueError(
            f"prefetch_steps {config.prefetch_steps} is not less than --lsa-window {config.window}: lower it"
        )
    if config.device_tokens is not None and config.device_memory_gb is not None:
        raise ValueError(
            f"--lsa-device-tokens {config.device_tokens} and --lsa-device-memory-gb {config.device_memory_gb} "
            "both size the device pool: give one of them"
        )
    if config.policy not in offered(config.indexer, None):
        raise ValueError(
            f"--lsa-policy {config.policy} needs a trained checkpoint: add --lsa-indexer PATH, or use "
            f"{offered(None, looks_at_index(config.policy))[0]}"
        )


def least_pages(min_pages: int, floor_tokens: int, page_tokens: int = PAGE_SIZE) -> int:
    """Pages of so many tokens that a resident set may have whatever its budget."""
    return max(min_pages, floor_tokens // page_tokens)


def called(config: Any, name: str) -> str:
    """What messages call the field ``name``: its flag, if it has one."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    return flag_of(name) if field.metadata["kind"] == FLAG else name


def coerce(name: str, declared: str, value: Any, source: str) -> Any:
    """``value`` as the type that the field ``name`` declares.

    Raises:
        ValueError: it has another type; the message begins with ``source``.
    """
    base = declared.removesuffix(" | None")
    if value is None and declared.endswith("| None"):
        return None
    if base == SWITCH:
        if isinstance(value, bool) or value == AUTO:
            return value
        raise ValueError(f"{source}: {name} is {value!r}: use true, false or {AUTO}")
    accepted: dict[str, Any] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    if base == SHARE:
        if value == AUTO:
            return AUTO
        if isinstance(value, str):
            raise ValueError(f"{source}: {name} is {value!r}: use a number in (0, 1], or {AUTO}")
        base = "float"
    if base.startswith("tuple"):
        if isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
            return tuple(value)
    elif isinstance(value, accepted[base]) and (base == "bool" or not isinstance(value, bool)):
        return float(value) if base == "float" else value
    raise ValueError(f"{source}: {name} is {value!r}: use a value of type {base}")


def require_fraction(name: str, value: float) -> None:
    """Raises ValueError unless it is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} {value} is out of range: use a number in (0, 1]")


def require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless it is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: use one of {', '.join(allowed)}")
