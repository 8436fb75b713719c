"""Arguments of ``sglang-lsa demo``."""

from __future__ import annotations

import argparse
import pathlib
import sys

from sglang_lsa.commands import Commands, add_command


def add_parser(commands: Commands) -> None:
    text = "compare LSA with stock SGLang on hidden facts, on any machine (about 3 minutes on 2 CPU cores)"
    command = add_command(commands, "demo", text)
    command.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("demo-output"), metavar="DIR", help="default: demo-output"
    )
    command.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    from sglang_lsa.demo.report import make_console
    from sglang_lsa.demo.run import run
    from sglang_lsa.demo.servers import DemoFailed

    try:
        return 0 if run(args.output, make_console()) else 1
    except DemoFailed as error:
        print(f"sglang-lsa demo: {error}", file=sys.stderr)
        return 1
