"""The names by which SGLang keeps two CUDA graphs of one size apart: one that reads in groups, one that does not."""

from __future__ import annotations

IN_GROUPS = "lsa-groups"


def label(variant: str | None, in_groups: bool) -> str | None:
    """Of a graph that SGLang itself calls ``variant``, None where it has one of each size."""
    if not in_groups:
        return variant
    return IN_GROUPS if variant is None else f"{variant}, {IN_GROUPS}"
