"""The command ``sglang-lsa``. What each subcommand takes, and runs, is in the folder of its tool."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from sglang_lsa import SGLANG_VERSIONS, __version__
from sglang_lsa.adapt.parser import add_parser as add_adapt
from sglang_lsa.bench.parser import add_parser as add_bench
from sglang_lsa.commands import Commands, add_command
from sglang_lsa.demo.parser import add_parser as add_demo
from sglang_lsa.doctor.parser import add_parser as add_doctor
from sglang_lsa.embedded_model import MODEL_NAME, EmbeddedModelError, embedded_model_path
from sglang_lsa.evaluation.parser import add_parser as add_eval
from sglang_lsa.serve.view.parser import add_parser as add_view
from sglang_lsa.training.parser import add_calibrate, add_recall, add_record, add_train

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0 if it did what it is for, 1 if it failed, 130 after Ctrl-C; wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="sglang-lsa", description="Lookahead Sparse Attention for SGLang")
    parser.add_argument(
        "--version", action="version", version=f"sglang-lsa {__version__} (SGLang {' or '.join(SGLANG_VERSIONS)})"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    args, more = parser.parse_known_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        parser.exit(2, "\nsglang-lsa: no command is given: use one of those above, for example sglang-lsa demo\n")
    if more and not getattr(args, "server_flags", False):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.more = more
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    try:
        return int(args.run(args))
    except EmbeddedModelError as error:
        print(f"sglang-lsa: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sglang-lsa: interrupted", file=sys.stderr)
        return INTERRUPTED


def add_model(commands: Commands) -> None:
    text = f"print the folder of the embedded model, {MODEL_NAME}; prepares it the first time"
    command = add_command(commands, "model", text)
    command.set_defaults(run=run_model)


def run_model(args: argparse.Namespace) -> int:
    print(embedded_model_path())
    return 0


COMMANDS: tuple[Callable[[Commands], None], ...] = (
    add_demo,
    add_doctor,
    add_bench,
    add_adapt,
    add_record,
    add_train,
    add_calibrate,
    add_eval,
    add_recall,
    add_model,
    add_view,
)


def _exit(number: int, frame: FrameType | None) -> None:
    """End like after an exception, so that servers are stopped."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
