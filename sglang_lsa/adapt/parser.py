"""Arguments of ``sglang-lsa adapt``."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

from sglang_lsa.adapt.settings import Settings
from sglang_lsa.commands import Commands, add_command, failing
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.training.parser import can_train


def add_parser(commands: Commands) -> None:
    text = (
        "make an indexer for a model: record, train, calibrate, measure, compare with full attention, and write it all "
        "down; goes on where it was interrupted (needs the extra: sglang-lsa[train])"
    )
    command = add_command(commands, "adapt", text)
    command.add_argument("--model", metavar="PATH", help="path or hub name; default: the embedded model")
    command.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR", help="folder of the indexer")
    command.add_argument(
        "--texts", type=pathlib.Path, metavar="DIR", help="text files to record over; default: Python's"
    )
    for field in dataclasses.fields(Settings):
        default: Any = field.default
        several = isinstance(default, tuple)
        kind = type(default[0] if several else default)
        command.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            nargs="+" if several else None,
            default=list(default) if several else default,
            metavar=field.metadata["metavar"],
            help=f"{field.metadata['help']}; default: {shown(default)}",
        )
    command.add_argument(
        "--servers",
        type=int,
        metavar="N",
        help="that record side by side; default: as many as the GPU has memory for, 4 at most; 1 on a CPU, and if "
        "--server-args, or a file that they name, name a device pool",
    )
    command.add_argument("--server-args", default="", metavar="'...'", help="more arguments for every server")
    command.add_argument("--keep-recordings", action="store_true", help="they are deleted at the end otherwise")
    command.set_defaults(run=run_adapt)


def shown(value: object) -> str:
    """A default, as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@failing("adapt", RuntimeError, ValueError, OSError)  # a step failed, or what is asked for cannot be done
def run_adapt(args: argparse.Namespace) -> int:
    if not can_train("adapt"):
        return 1
    from rich.console import Console

    from sglang_lsa.adapt.command import adapt

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = Settings(**values)
    if args.servers is not None and args.servers < 1:
        raise ValueError(f"--servers {args.servers} is too small: use 1 or more")
    adapt(
        args.model or str(embedded_model_path()),
        args.output,
        settings,
        Console(width=120),
        texts=args.texts,
        server_args=args.server_args,
        keep_recordings=args.keep_recordings,
        servers=args.servers,
    )
    return 0
