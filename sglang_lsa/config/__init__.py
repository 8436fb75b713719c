"""Configuration: flags, the JSON file, ``docs/configuration.md`` and a request's options, of one frozen dataclass."""

from sglang_lsa.config.allowed import (
    AUTO,
    MOST_LOOKED_UP,
    PAGE_SIZE,
    PREFILLS,
    RECORDED_POSITIONS,
    RUNS,
    coerce,
)
from sglang_lsa.config.flags import add_cli_args, config_from_args, config_from_argument
from sglang_lsa.config.options import MOST_WATCHED, GivenSet, RequestOptions, read_sets
from sglang_lsa.config.policies import FULL, POLICIES, Offer, looks_at_index, no_auto, offered
from sglang_lsa.config.values import LSAConfig, arrived_by_pickle

__all__ = [
    "AUTO",
    "FULL",
    "MOST_LOOKED_UP",
    "MOST_WATCHED",
    "PAGE_SIZE",
    "POLICIES",
    "PREFILLS",
    "RECORDED_POSITIONS",
    "RUNS",
    "GivenSet",
    "LSAConfig",
    "Offer",
    "RequestOptions",
    "add_cli_args",
    "arrived_by_pickle",
    "coerce",
    "config_from_args",
    "config_from_argument",
    "looks_at_index",
    "no_auto",
    "offered",
    "read_sets",
]
