"""Pools of servers that are started for a known set of prompts.

What a server takes by default is for whoever comes: all of the device's memory, and half of the host's, which takes a
minute or more to be locked.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
from collections.abc import Sequence

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.config.values import read_json_object
from sglang_lsa.engine.sizing import HOST_SHARE
from sglang_lsa.memory.mirror import available_host_memory
from sglang_lsa.memory.pages import align_up

BYTES = 4
"""Of a number of the KV, at most."""
LEAST_TOKENS = 16_384
LEAST_GB = 0.25
GB = 1e9
OPTIONS = "--lsa-config"
POOLS = ("--lsa-device-tokens", "--lsa-device-memory-gb")
MIRROR = "--lsa-host-memory-gb"
TRUSTED = "--trust-remote-code"
RANKS, FIRST_GPU, GPU_STEP = "--tp-size", "--base-gpu-id", "--gpu-id-step"
FLAGS = (OPTIONS, *POOLS, MIRROR, TRUSTED, RANKS, FIRST_GPU, GPU_STEP)


def pool_flags(model: str, longest: int, prompts: int, server_args: str, servers: int = 1) -> list[str]:
    """Flags for a device pool of so many prompts of ``longest`` tokens, and a mirror of twice as many.

    A machine with less memory gives each server its share of what a single one would take. The pool is never larger
    than the mirror, which a server refuses. None for a model whose KV is not known: its server says what is wrong.

    Args:
        model: path or hub name.
        server_args: a pool or a mirror that is named there, or in a file there, is left as it is, the other one then
            made to fit.
        servers: that share this machine's memory.

    Raises:
        ValueError: a quotation mark of ``server_args`` has no other, or a file that they name cannot be read.
    """
    named = _named(server_args)
    share = f"{_host_bytes() / servers / GB:.2f}"
    if any(named[flag] is not None for flag in POOLS):
        # How large it is in bytes is the server's to say; one alone takes the mirror that it takes by default.
        return [] if named[MIRROR] is not None or servers == 1 else [MIRROR, share]
    per_token = _token_bytes(model, named[TRUSTED] is not None)
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
    """Whether a device pool is named, by a flag or in a file: a server takes it whatever the machine has.

    Raises:
        ValueError: as :func:`pool_flags`.
    """
    named = _named(server_args)
    return any(named[flag] is not None for flag in POOLS)


def gpus_of(server_args: str) -> range:
    """Numbers of the GPUs that a server runs on, one for each of its ranks.

    Raises:
        ValueError: as :func:`pool_flags`, or one of them is no number that a server takes.
    """
    named = _named(server_args)

    def number(flag: str, default: int, least: int) -> int:
        try:
            value = default if (given := named[flag]) is None else int(given)
        except ValueError:
            value = least - 1
        if value < least:
            raise ValueError(f"--server-args: {flag} {named[flag]}: use a whole number, {least} or more")
        return value

    ranks, first, step = number(RANKS, 1, 1), number(FIRST_GPU, 0, 0), number(GPU_STEP, 1, 1)
    return range(first, first + ranks * step, step)


def _named(server_args: str) -> dict[str, str | None]:
    """What ``FLAGS`` say, in all spellings and files that a server reads; None if they are not there."""
    parser = argparse.ArgumentParser(prog="--server-args", usage=argparse.SUPPRESS, add_help=False)
    for flag in FLAGS:
        spellings = (flag, "--tensor-parallel-size") if flag == RANKS else (flag,)
        parser.add_argument(*spellings, nargs="?", const="", dest=flag)
    words = shlex.split(server_args)
    named: dict[str, str | None] = vars(parser.parse_known_args([*_of_file(words), *words])[0])
    options = read_json_object(path) if (path := named[OPTIONS]) else {}
    for flag in (*POOLS, MIRROR):
        value = options.get(flag.removeprefix("--lsa-").replace("-", "_"))
        if named[flag] is None and value is not None:  # flags win
            named[flag] = str(value)
    return named


def _of_file(words: Sequence[str]) -> list[str]:
    """Flags of the YAML file that SGLang's ``--config`` names, in that spelling only, and puts before all others.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if "--config" not in words:
        return []
    import yaml  # which comes with transformers

    file = "".join(words[words.index("--config") + 1 :][:1])
    try:
        values = yaml.safe_load(pathlib.Path(file).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: cannot be read ({error}): give an existing YAML file of flags") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {file}: holds a {type(values).__name__}: write one flag a line, as tp-size: 2")
    given = {f"--{key}": value for key, value in values.items() if not isinstance(value, bool | list)}
    switches = [f"--{key}" for key, value in values.items() if value is True]
    texts = {flag: json.dumps(value) if isinstance(value, dict) else str(value) for flag, value in given.items()}
    return [*switches, *(word for flag, text in texts.items() for word in (flag, text))]


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
