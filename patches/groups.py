"""Whether requests read pages together (the key ``groups``), as far as SGLang's arguments decide it.

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
    fits = dense and measured and ranks == 1 and backend is not None
    fits = fits and READS_TOGETHER.get(server_args.device) == backend
    logger.info(
        "LSA: groups are %s: decode runs on %s (%s, %d ranks)",
        "on" if fits else "off", backend, server_args.device, ranks,
    )  # fmt: skip
    policy = None if config.policy_is_default else config.policy  # that nobody asked for it stays known
    margin = config.group_margin if fits else 0.0
    return dataclasses.replace(config, policy=policy, groups=fits, group_margin=margin)
