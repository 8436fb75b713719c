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
    ranks = getattr(server_args, "tp_size", 1)
    fits = dense and measured and ranks == 1 and backend is not None and not _is_fp8(server_args)
    fits = fits and READS_TOGETHER.get(server_args.device) == backend
    logger.info(
        "LSA: groups are %s: decode runs on %s (%s, %d ranks)",
        "on" if fits else "off", backend, server_args.device, ranks,
    )  # fmt: skip
    return _replaced(config, groups=fits, group_margin=config.group_margin if fits else 0.0)


def with_calibration(config: LSAConfig, server_args: Any, dense: bool, measured: bool = True) -> LSAConfig:
    """The configuration with calibration kept in the cache, or left out, where it was ``auto``. Where it was measured
    it was better than Quest, on a GPU it takes seconds, and on a CPU it would take many minutes.

    Args: as for :func:`with_groups`.

    Raises:
        ValueError: the budget is ``auto``, and nothing that was asked for knows how much a set covers.
    """
    if config.calibrate != AUTO:
        return config
    fits = dense and measured and getattr(server_args, "tp_size", 1) == 1 and server_args.device == "cuda"
    fits = fits and not _is_fp8(server_args)
    return _replaced(config, calibrate="cached" if fits else "never")


def _is_fp8(server_args: Any) -> bool:
    """As far as flags say; neither was measured with KV in FP8."""
    return str(getattr(server_args, "kv_cache_dtype", "auto")).startswith("fp8")


def _replaced(config: LSAConfig, **values: Any) -> LSAConfig:
    policy = None if config.policy_is_default else config.policy  # that nobody asked for it stays known
    return dataclasses.replace(config, policy=policy, **values)
