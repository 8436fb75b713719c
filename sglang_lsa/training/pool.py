"""Pools of servers that are started for a known set of prompts.

What a server takes by default is for whoever comes: all of the device's memory, and half of the host's, which takes a
minute or more to be locked.
"""

from __future__ import annotations

import argparse
import shlex

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.sizing import HOST_SHARE
from sglang_lsa.memory.mirror import available_host_memory
from sglang_lsa.memory.pages import align_up

BYTES = 4
"""Of a number of the KV, at most."""
LEAST_TOKENS = 16_384
LEAST_GB = 0.25
GB = 1e9
FILES = ("--lsa-config", "--config")
POOLS = ("--lsa-device-tokens", "--lsa-device-memory-gb")
MIRROR = "--lsa-host-memory-gb"


def pool_flags(model: str, longest: int, prompts: int, server_args: str, servers: int = 1) -> list[str]:
    """Flags for a device pool of so many prompts of ``longest`` tokens, and a mirror of twice as many.

    A machine with less memory gives each server its share of what a single one would take. The pool is never larger
    than the mirror, which a server refuses. None for a model whose KV is not known: its server says what is wrong.

    Args:
        model: path or hub name.
        server_args: a pool or a mirror that is named there is left as it is, the other one then made to fit.
        servers: that share this machine's memory.

    Raises:
        ValueError: a quotation mark of ``server_args`` has no other.
    """
    named = _named(server_args)
    if any(named[flag] is not None for flag in FILES):
        return []
    share = f"{_host_bytes() / servers / GB:.2f}"
    if any(named[flag] is not None for flag in POOLS):
        # How large it is in bytes is the server's to say; one alone takes the mirror that it takes by default.
        return [] if named[MIRROR] is not None or servers == 1 else [MIRROR, share]
    per_token = _token_bytes(model, named["--trust-remote-code"] is not None)
    if per_token is None:
        return []
    tokens = align_up(max(LEAST_TOKENS, prompts * longest), PAGE_SIZE)
    wanted = max(LEAST_GB, 2 * tokens * per_token / GB)
    try:
        mirror = min(wanted, float(share)) if (given := named[MIRROR]) is None else float(given)
    except ValueError:  # no number, which the server refuses
        return []
    most = int(mirror * GB / per_token) // PAGE_SIZE * PAGE_SIZE - 2 * PAGE_SIZE  # one page is never used
    flags = [POOLS[0], str(max(PAGE_SIZE * 4, min(tokens, most)))]
    return flags if given is not None else [*flags, MIRROR, f"{mirror:.2f}"]


def names_pool(server_args: str) -> bool:
    """Whether a device pool is named, or a file in which one may be: how much memory a server takes is not known."""
    named = _named(server_args)
    return any(named[flag] is not None for flag in (*FILES, *POOLS))


def _named(server_args: str) -> dict[str, str | None]:
    """What flags say, in all spellings that a server reads; None if they are not there."""
    parser = argparse.ArgumentParser(prog="--server-args", usage=argparse.SUPPRESS, add_help=False)
    flags = (*FILES, *POOLS, MIRROR, "--trust-remote-code")
    for flag in flags:
        parser.add_argument(flag, nargs="?", const="", dest=flag)
    return vars(parser.parse_known_args(shlex.split(server_args))[0])


def _host_bytes() -> float:
    """That the mirrors of all servers take at most."""
    import torch

    return available_host_memory() * HOST_SHARE["cuda" if torch.cuda.is_available() else "cpu"]


def _token_bytes(model: str, trusted: bool) -> int | None:
    """Of a token's KV at most; None if the configuration does not say."""
    from transformers import AutoConfig

    from sglang_lsa.patches.models import shape_of

    try:
        shape = shape_of(AutoConfig.from_pretrained(model, trust_remote_code=trusted).get_text_config())
        return 2 * shape.num_hidden_layers * shape.kv_heads * shape.head_dim * BYTES
    except (OSError, ValueError, TypeError, AttributeError):
        return None
