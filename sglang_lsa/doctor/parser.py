"""Arguments of ``sglang-lsa doctor``; the server's own flags go by."""

from __future__ import annotations

import argparse

from sglang_lsa.commands import Commands, add_command


def add_parser(commands: Commands) -> None:
    text = (
        "whether a server with these flags would start here, what it would hold in which memory, and how many contexts "
        "it would run; loads nothing (about 20 seconds)"
    )
    command = add_command(
        commands,
        "doctor",
        text,
        epilog="All other flags are the server's: --model-path (default: the embedded model), --lsa-*, SGLang's own. "
        "Exit status: 0 all is well, 1 trouble, 2 wrong usage.",
        allow_abbrev=False,  # the server's flags could begin with one of ours
    )
    command.add_argument(
        "--context-tokens",
        nargs="+",
        type=int,
        metavar="N",
        help="how many contexts of so many tokens, prompt and answer, run at the same time; it is trouble if none does",
    )
    command.add_argument(
        "--gpu-memory-gb", type=float, metavar="G", help="plan for a GPU of this size, which need not be here"
    )
    command.add_argument(
        "--free-host-memory-gb", type=float, metavar="G", help="plan for a host with so much free memory, likewise"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")
    command.set_defaults(run=run_doctor, server_flags=True)


def run_doctor(args: argparse.Namespace) -> int:
    from sglang_lsa.doctor.command import from_arguments

    return from_arguments(args, args.more)
