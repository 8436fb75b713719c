"""What can be seen to be wrong with a server's command line before SGLang is imported, which takes half a minute."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import pathlib
import socket
from collections.abc import Sequence

from sglang_lsa.config.flags import add_cli_args, config_from_args
from sglang_lsa.config.kinds import CONSTANT, FLAG, flag_of
from sglang_lsa.config.values import LSAConfig

PREFIX = "--lsa-"
HOST, PORT = "127.0.0.1", 30_000
"""Of SGLang, where nothing else is said."""
ANY_ADDRESS = ("", "0.0.0.0", "::")


def check_command_line(argv: Sequence[str]) -> bool:
    """Refuse what a start would end with: ``--lsa-*`` flags that do not exist or have no such value, a model folder
    that is not there, a port on which a server listens.

    Returns:
        Whether all that is asked was read here: SGLang takes abbreviations, and files.

    Raises:
        SystemExit: 2, a flag cannot be read; one line has said which, and what to do.
        ValueError: values do not fit together or are out of range, the folder is not there, or the port is taken.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        return False
    parser = _parser()
    flags = [name for action in parser._actions for name in action.option_strings if name.startswith(PREFIX)]
    known, others = parser.parse_known_args(argv)
    unread = [name for argument in others if (name := argument.split("=")[0]).startswith(PREFIX)]
    for name in unread:
        if not any(flag.startswith(name) for flag in flags):
            parser.error(f"there is no {name}: {_instead(name, flags)}")
    require_model(known.model_path)
    if unread or known.config:
        return False
    config_from_args(known)
    if known.port.isdecimal() and known.node_rank == "0":
        require_port(known.host, int(known.port))
    return True


def read_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of one that :func:`check_command_line` could read, those of SGLang that decide what LSA makes of its
    own among them, as text."""
    return _parser().parse_known_args(argv)[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang-lsa", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    add_cli_args(parser)
    parser.add_argument("--model-path", "--model", default=None)
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", default=str(PORT))
    parser.add_argument("--node-rank", default="0")
    parser.add_argument("--config", default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--tp-size", "--tensor-parallel-size", default="1")
    parser.add_argument("--kv-cache-dtype", default="auto")
    return parser


def _instead(name: str, flags: Sequence[str]) -> str:
    option = name.removeprefix(PREFIX).replace("-", "_")
    keys = [f.name for f in dataclasses.fields(LSAConfig) if f.metadata["kind"] not in (FLAG, CONSTANT)]
    if option in keys:
        return f"it is a key, --lsa-config '{{\"{option}\": VALUE}}'"
    own = [flag.removeprefix(PREFIX).replace("-", "_") for flag in flags if flag.startswith(PREFIX)]
    (near, *_) = difflib.get_close_matches(option, [*own, *keys], 1, cutoff=0.7) or ("",)
    if near in own:
        return f"did you mean {flag_of(near)}?"
    if near:
        return f"did you mean the key {near}, --lsa-config '{{\"{near}\": VALUE}}'?"
    return f"use one of {', '.join(sorted(map(flag_of, own)))}"


def require_model(path: str | None) -> None:
    """
    Raises:
        ValueError: ``path`` is that of a folder or file, and there is none.
    """
    looks_local = path is not None and path.startswith(("/", "./", "../", "~"))
    if path is not None and looks_local and not pathlib.Path(os.path.expanduser(path)).exists():
        raise ValueError(
            f"--model-path {path}: there is no such folder: give one with a config.json, or a model's name on the hub"
        )


def require_port(host: str, port: int) -> None:
    """
    Raises:
        ValueError: somebody answers there.
    """
    try:
        socket.create_connection((HOST if host in ANY_ADDRESS else host, port), timeout=1).close()
    except OSError:
        return
    raise ValueError(f"--port {port}: a server listens there already, on {host}: end it, or give another --port")
