"""Arguments of ``sglang-lsa view``."""

from __future__ import annotations

import argparse
import sys
from urllib.parse import urlsplit

from sglang_lsa.commands import Commands, add_command


def add_parser(commands: Commands) -> None:
    text = "show the live view of a server that wants its API key: the page asks for it, and this command passes it on"
    command = add_command(commands, "view", text)
    command.add_argument("server", type=address, metavar="URL", help="of the server, such as http://host:30000")
    command.add_argument("--port", type=int, default=0, help="on this machine; default: any that is free")
    command.set_defaults(run=run_view)


def address(text: str) -> str:
    """Of a server; anything else is wrong usage."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a server: write http://host:port")
    return text


def run_view(args: argparse.Namespace) -> int:
    import asyncio

    from sglang_lsa.serve.view.forward import serve

    try:
        asyncio.run(serve(args.server, args.port, lambda address: print(f"Open {address}", flush=True)))
    except OSError as error:
        print(f"sglang-lsa view: port {args.port}: {error.strerror}: choose another --port", file=sys.stderr)
        return 1
    return 0
