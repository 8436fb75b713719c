"""What the argument parsers of all commands share."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]
"""Runs a command and returns its exit status."""


def add_command(commands: Commands, name: str, text: str, **more: Any) -> argparse.ArgumentParser:
    """Add a command whose description is its help, with a capital letter."""
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:], **more)


def failing(command: str, *errors: type[Exception]) -> Callable[[Run], Run]:
    """Decorates a command: what is among ``errors`` is printed, and the exit status is then 1."""

    def decorate(run: Run) -> Run:
        @functools.wraps(run)
        def reporting(args: argparse.Namespace) -> int:
            try:
                return run(args)
            except errors as error:
                print(f"sglang-lsa {command}: {error}", file=sys.stderr)
                return 1

        return reporting

    return decorate
