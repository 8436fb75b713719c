"""What is ``auto`` in a configuration and depends on SGLang's arguments: whether requests read pages together
(``groups``), and whether a server finds heads that choose pages at its start (``calibrate``).

Works on the arguments' attributes; imports no SGLang.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from sglang_lsa.config import AUTO, LSAConfig

logger = logging.getLogger(__name__)

READS_TOGETHER = {"cuda": "flashinfer"}
"""Backend of decode, by device, for which ``auto`` is on: what was made for speed. A CPU can, to show what happens."""


def decode_backend(server_args: Any) -> tuple[str, str | None]:
    """The attribute of resolved arguments that says which backend decodes, and which that is; None if nothing does."""
    for name in ("decode_attention_backend", "attention_backend"):
        if (backend := getattr(server_args, name, None)) is not None:
            return name, backend
    return "attention_backend", None


def with_groups(config: LSAConfig, server_args: Any, dense: bool, measured: bool = True) -> LSAConfig:
    """The configuration with ``groups`` on or off, where it was ``auto``; what was said of them goes where they do.

    Args:
        server_args: resolved.
        dense: the model attends to all that it is given.
        measured: SGLang's release is one with which groups were run on a GPU.
    """
    if config.groups != AUTO:
        return config
    _, backend = decode_backend(server_args)
    where = f"decode runs on {backend} ({server_args.device})"
    why = _not_measured(server_args, dense, measured)
    fits = not why and backend is not None and READS_TOGETHER.get(server_args.device) == backend
    logger.info("LSA: groups are %s: %s%s", "on" if fits else "off", where, f", {why}" if why else "")
    return _replaced(config, groups=fits, group_margin=config.group_margin if fits else 0.0)


def with_calibration(config: LSAConfig, server_args: Any, dense: bool, measured: bool = True) -> LSAConfig:
    """The configuration with calibration kept in the cache, or left out, where it was ``auto``. Where it was measured,
    on a GPU, it was better than Quest and took seconds.

    Args: as for :func:`with_groups`.

    Raises:
        ValueError: the budget is ``auto``, and nothing that was asked for knows how much a set covers.
    """
    if config.calibrate != AUTO:
        return config
    fits = server_args.device == "cuda" and not _not_measured(server_args, dense, measured)
    return _replaced(config, calibrate="cached" if fits else "never")


def _not_measured(server_args: Any, dense: bool, measured: bool) -> str:
    """Why neither has been run on a GPU like this, as far as flags tell; empty where both have."""
    if not dense:
        return "and the model has an index of its own"
    if not measured:
        return "and they were not run with this SGLang on a GPU yet"
    if (ranks := getattr(server_args, "tp_size", 1)) > 1:
        return f"and they were not run on {ranks} GPUs yet"
    if str(kind := getattr(server_args, "kv_cache_dtype", "auto")).startswith("fp8"):
        return f"and they were not run with KV in {kind} yet"
    return ""


def _replaced(config: LSAConfig, **values: Any) -> LSAConfig:
    policy = None if config.policy_is_default else config.policy  # that nobody asked for it stays known
    return dataclasses.replace(config, policy=policy, **values)
